"""A x, computed once for the layers that read the same x: query, key and value; gate and up.

The last product of a thread is remembered, and handed out again only for the very same x and A (the same tensor
objects, with no write to them in between; torch counts the writes of every tensor) and only once to each layer_id: a
layer that comes a second time belongs to another pass through the model. It is forgotten with x.
"""

import threading
import weakref
from typing import Any

import torch
from torch import Tensor

from veratune.ops.matrix import Matrix, cache_key, matmul


class _Last(threading.local):
    """The last product of this thread."""

    def __init__(self) -> None:
        self.x: weakref.ref[Tensor] | None = None
        self.key: tuple[Any, ...] = ()
        self.layer_ids: set[int] = set()
        self.product: Tensor | None = None

    def forget(self, dead: "weakref.ref[Tensor]") -> None:
        if self.x is dead:
            self.x, self.key, self.layer_ids, self.product = None, (), set(), None


_last = _Last()


def project(x: Tensor, A: Matrix, layer_id: int | None) -> Tensor:
    """X Aᵀ, as a number and not as a step that autograd knows: its callers give the gradients.

    x: (*T, n); A: (r, n), in the dtype of x; layer_id: a number of the layer that asks, None for nobody who shares.
    Returns (*T, r), which must not be written to.
    Nothing is remembered where writes cannot be told: in compiled code (whose compiler finds equal products by itself), in
    inference mode, and for tensors of other kinds.
    """
    if (
        layer_id is None
        or torch.compiler.is_compiling()
        or type(x) is not Tensor
        or x.is_inference()
    ):
        return matmul(A, x)
    key = (x._version, *cache_key(A))
    if (
        _last.x is not None
        and _last.x() is x
        and _last.key == key
        and layer_id not in _last.layer_ids
    ):
        assert _last.product is not None
        _last.layer_ids.add(layer_id)
        return _last.product
    product = matmul(A, x)
    _last.x, _last.key, _last.layer_ids, _last.product = (
        weakref.ref(x, _last.forget),
        key,
        {layer_id},
        product,
    )
    return product
