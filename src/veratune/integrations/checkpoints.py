"""Checkpoints of adapted models: the trained tensors, never the base weights."""

from torch import Tensor, nn


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """The trained part of a model's state_dict, by the same names.

    Args:
        model: A model with an adapter.

    Returns:
        Parameters with requires_grad, and the buffers of modules that hold one, such as a trained
        batch normalisation's statistics. Each tensor is contiguous and on the CPU.
    """
    tensors: dict[str, Tensor] = {}
    for path, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        trained = {name: p for name, p in own.items() if p.requires_grad}
        found = {**trained, **(dict(module.named_buffers(recurse=False)) if trained else {})}
        for name, tensor in found.items():
            tensors[f"{path}.{name}".lstrip(".")] = tensor.detach().cpu().contiguous()
    return tensors
