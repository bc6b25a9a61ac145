"""VeraLayer: a module that wraps a layer of the model and holds its adapters.

    ModuleWrapper
    └── VeraLayer (abstract)
        ├── VeraHead                    a module trained in full, one copy for each adapter
        └── VeraWeightLayer (abstract)  a layer with weight matrices W, each adapted by d and b
            ├── VeraLinear              a linear layer, dense, transposed, fused or quantized
            ├── VeraConv                a convolution, transposed or not
            ├── VeraExperts             the fused weights of a mixture of experts
            └── VeraMultiheadAttention  torch's attention block, which never calls its projections

The wrapped layer stays whole under `base`; detaching puts the same module back. Its tensors keep
their names in `state_dict`, so that checkpoints of the base model load and `save_pretrained` writes
them.
"""

import abc
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from veratune.errors import AdapterStateError
from veratune.layers.recomputation import Recomputation
from veratune.layers.rows import Rows

_BASE = "base."
_OWN_PREFIXES = ("base.", "vera.")


class ModuleWrapper(nn.Module):
    """A module that replaces another one; attributes that it lacks are those of the wrapped module.

    Args:
        base: The wrapped module.
        name: Its path in the model.
    """

    def __init__(self, base: nn.Module, name: str) -> None:
        super().__init__()
        self.base = base
        self.name = name
        self.training = base.training

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base":
                raise
            return getattr(super().__getattr__("base"), name)


def replace_modules(model: nn.Module, choose: Callable[[nn.Module], nn.Module]) -> None:
    """Replace each module inside a model by choose(module), wherever it is registered.

    Modules inside a ModuleWrapper are left alone.
    """
    for parent in [m for m in model.modules() if not isinstance(m, ModuleWrapper)]:
        for name, child in list(parent._modules.items()):
            chosen = child if child is None else choose(child)
            if chosen is not child:
                setattr(parent, name, chosen)


class VeraLayer(ModuleWrapper, abc.ABC):
    """A layer with adapters.

    Attributes:
        active: The adapter in use, or None for the base model.
        rows: The adapters of a mixed batch; it takes precedence over `active`.
        merged: The adapter whose ΔW is in W, or None.
    """

    def __init__(self, base: nn.Module, name: str) -> None:
        super().__init__(base, name)
        self.vera = nn.ModuleDict()
        self.active: str | None = None
        self.rows: Rows | None = None
        self.merged: str | None = None
        self._recomputation = Recomputation()
        self.register_state_dict_post_hook(_strip_base_prefix)
        self.register_load_state_dict_pre_hook(_add_base_prefix)

    @abc.abstractmethod
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the base layer's output with the adapter's update; called as the base layer
        is.
        """

    def check_recomputation(self) -> None:
        """Raise AdapterStateError where checkpointing runs a forward again with another adapter.

        Every forward begins with it.
        """
        rows = None if self.rows is None else tuple(self.rows.names)
        self._recomputation.check(self.name, self.current if rows is None else rows)

    @property
    def current(self) -> str | None:
        """The adapter that is computed for the whole batch; None if merged or without any here."""
        name = self.active
        return name if name is not None and self.merged is None and name in self.vera else None


def _strip_base_prefix(
    module: nn.Module, state: dict[str, Tensor], prefix: str, metadata: object
) -> None:
    """Write the base layer's tensors under their names, and as they were before a merge.

    A state dict of a merged model thus holds W and the vectors, never W + ΔW and the vectors.
    """
    for key in [k for k in state if k.startswith(prefix + _BASE)]:
        state[prefix + key[len(prefix) + len(_BASE) :]] = state.pop(key)
    for name, weight in getattr(module, "weights_before_merge", {}).items():
        state[prefix + name] = weight


def _add_base_prefix(
    module: "VeraLayer", state: dict[str, Tensor], prefix: str, *rest: object
) -> None:
    """The inverse of `_strip_base_prefix`; names that already say `base` are taken too."""
    if module.merged is not None:
        raise AdapterStateError(
            f"adapter {module.merged!r} is merged into the weights; unmerge before load_state_dict"
        )
    for key in list(state):
        if key.startswith(prefix) and not key[len(prefix) :].startswith(_OWN_PREFIXES):
            state[prefix + _BASE + key[len(prefix) :]] = state.pop(key)
