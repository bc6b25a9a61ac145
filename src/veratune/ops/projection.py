"""A x, computed once for the layers that read the same x: query, key and value; gate and up."""

import threading
import weakref
from collections.abc import Callable
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from veratune.ops.matrix import CacheKey, Matrix, cache_key, matmul

MatrixT = TypeVar("MatrixT", bound=Matrix)


class ProjectionCache(threading.local):
    """The last projection A x of each thread.

    It is used again only for the same x and A (the same tensor objects, with no write in between;
    torch counts the writes of every tensor) and only once per layer: a layer that asks a second
    time belongs to another forward pass. It is freed with x.
    """

    def __init__(self) -> None:
        self.x: weakref.ref[Tensor] | None = None
        self.key: CacheKey = ()
        self.layer_ids: set[int] = set()
        self.product: Tensor | None = None

    def get(self, x: Tensor, key: CacheKey, layer_id: int) -> Tensor | None:
        """Return the projection of this x, once for each layer; None if another one is kept."""
        if self.x is None or self.x() is not x or self.key != key or layer_id in self.layer_ids:
            return None
        self.layer_ids.add(layer_id)
        return self.product

    def put(self, x: Tensor, key: CacheKey, layer_id: int, product: Tensor) -> None:
        """Keep the projection of x for the layers after this one."""
        self.x, self.key = weakref.ref(x, self._free), key
        self.layer_ids, self.product = {layer_id}, product

    def _free(self, reference: "weakref.ref[Tensor]") -> None:
        if self.x is reference:
            self.x, self.key, self.layer_ids, self.product = None, (), set(), None


PROJECTIONS = ProjectionCache()


def project(
    x: Float[Tensor, "*T n"],
    A: MatrixT,
    layer_id: int | None,
    multiply: Callable[[MatrixT, Tensor], Tensor] | None = None,
) -> Tensor:
    """Compute x Aᵀ outside autograd, or reuse it from the layer before; the caller gives gradients.

    Nothing is reused where writes cannot be counted: in compiled code (the compiler finds equal
    products by itself), in inference mode, and for subclasses of Tensor.

    Args:
        x: Activations, shape (*T, n).
        A: Frozen down-projection, shape (r, n), in x's dtype.
        layer_id: Number of the calling layer; None computes without sharing.
        multiply: Multiplies A and x into another layout than (*T, r), the same for the same A.

    Returns:
        The projection, shape (*T, r), or as `multiply` lays it out. It may be shared: callers must
        not write to it.
    """
    if (
        layer_id is None
        or torch.compiler.is_compiling()
        or type(x) is not Tensor
        or x.is_inference()
    ):
        return multiply(A, x) if multiply else matmul(A, x)
    key = (x._version, *cache_key(A))
    product = PROJECTIONS.get(x, key, layer_id)
    if product is None:
        product = multiply(A, x) if multiply else matmul(A, x)
        PROJECTIONS.put(x, key, layer_id, product)
    return product
