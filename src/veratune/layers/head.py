"""VeraHead: a module trained in full, such as a classifier; every adapter has its own copy."""

from typing import Any

from torch import nn

from veratune.layers.rows import run_by_adapter
from veratune.layers.wrapper import VeraLayer


class VeraHead(VeraLayer):
    """A head with one copy for each adapter; the base model uses the original."""

    def add(self, adapter: str, module: nn.Module) -> None:
        """Give an adapter its copy."""
        self.vera[adapter] = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.check_recomputation()
        if self.rows is None:
            return self._module_of(self.active)(*args, **kwargs)
        return run_by_adapter(self, args, kwargs, self._module_of)

    def _module_of(self, adapter: str | None) -> nn.Module:
        return self.vera[adapter] if adapter is not None and adapter in self.vera else self.base
