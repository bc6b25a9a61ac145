"""Gradient checkpointing: is a forward computed again with the adapter that it began with?

Checkpointing runs a forward twice: without keeping activations, and again during backward. Another
adapter in between gives gradients of another function, and to another adapter.
"""

import collections
from typing import Any

import torch

from veratune.errors import AdapterStateError


class Recomputation:
    """The forwards of one layer that gradient checkpointing is going to run again, by adapter."""

    def __init__(self) -> None:
        self._pending: collections.Counter[object] = collections.Counter()

    def check(self, layer: str, selection: Any) -> None:
        """Count a forward, or raise where it is computed again with another adapter.

        Args:
            layer: The layer's name.
            selection: The adapter of this forward, or the adapters of its rows.

        Raises:
            AdapterStateError: Backward runs the layer with an adapter that its forward had not.
        """
        if torch.compiler.is_compiling():
            return
        if torch._C._current_graph_task_id() == -1:  # outside of backward
            if _is_checkpointed():
                self._pending[selection] += 1
        elif self._pending:
            self._pending[selection] -= 1
            if self._pending[selection] < 0:
                wanted = [key for key, count in self._pending.items() if count > 0]
                self._pending.clear()
                raise AdapterStateError(
                    f"gradient checkpointing computes layer '{layer}' again with {_said(selection)}"
                    f"; its forward ran with {' and '.join(map(_said, wanted)) or 'another'}. Call "
                    "backward before use(), disabled() or the end of rows() changes the adapter"
                )


def _is_checkpointed() -> bool:
    """Whether a forward runs inside torch.utils.checkpoint, reentrant or not."""
    if torch.is_inference_mode_enabled():
        return False
    if torch.is_grad_enabled():  # not reentrant: checkpoint packs the saved tensors
        return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None
    # Reentrant: inside an autograd function, which turns both modes off; no_grad() turns one off.
    return not torch._C._is_fwd_grad_enabled()


def _said(selection: object) -> str:
    if selection is None:
        return "the base model"
    return f"adapter {selection!r}" if isinstance(selection, str) else "the adapters of rows()"
