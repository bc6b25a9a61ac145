"""torch's fused encoder kernel reads weights past the layers: adapted encoders must not take it."""

from torch import nn

from veratune.layers.wrapper import VeraLayer


def leave_fast_path(model: nn.Module, slowed: list[nn.Module]) -> None:
    """Take adapted nn.TransformerEncoderLayers off torch's fused kernel for evaluation.

    A layer with a hook does not take that path. An encoder that would make nested tensors for it
    must not.

    Args:
        model: The adapted model.
        slowed: The modules that were changed already; those changed now are appended.
    """
    for module in model.modules():
        if not isinstance(module, nn.TransformerEncoderLayer | nn.TransformerEncoder):
            continue
        is_adapted = any(isinstance(inner, VeraLayer) for inner in module.modules())
        if not is_adapted or any(module is known for known in slowed):
            continue
        if isinstance(module, nn.TransformerEncoderLayer):
            module.register_forward_pre_hook(_keep_slow)
            slowed.append(module)
        elif getattr(module, "use_nested_tensor", False):
            module.use_nested_tensor = False
            slowed.append(module)


def restore_fast_path(slowed: list[nn.Module]) -> None:
    """Undo `leave_fast_path`."""
    for module in slowed:
        if isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = True
            continue
        hooks = module._forward_pre_hooks
        for key in [key for key, hook in hooks.items() if hook is _keep_slow]:
            del hooks[key]


def _keep_slow(module: nn.Module, args: object) -> None:
    """A hook that does nothing: its presence alone turns the fused kernel off."""
