"""Prove where the batch dimension is before adapters are mixed in one batch.

Under `rows`, each adapted layer must know which slice of its input belongs to which row of the
batch. Most models keep the batch first; XLNet and Longformer put the sequence first, routed experts
see tokens in any order, and some layers see no batch at all. So the first call runs the base model
twice, once with the rows rolled by one. A layer's input must be rolled in the same way along one
dimension: that dimension is the batch. The result is kept with the model; later calls cost nothing.
"""

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from veratune.errors import UnsupportedError
from veratune.layers.linear import VeraLinear
from veratune.layers.rows import Rows
from veratune.layers.wrapper import VeraLayer
from veratune.model_state import vera_layers

Layout = Literal["first", "second", "unknown"]

_TOLERANCE = 1e-2  # of an input's spread: rounding stays below it; five times that in 16 bits

# Inputs that have no batch dimension, or one of size 1.
_NOT_BATCHED = frozenset({"cache_position"})
_MAIN_INPUTS = ("input_ids", "inputs_embeds", "pixel_values", "input_features", "input_values")


@contextlib.contextmanager
def prove_rows(root: nn.Module, rows: Rows, layouts: dict[str, Layout]) -> Iterator[None]:
    """Within the block, each call of the model proves the layout of the layers it reaches.

    Args:
        root: The adapted model.
        rows: The adapters of the batch; without two different ones nothing needs a proof.
        layouts: The layouts proven so far, by layer name; it is extended.

    Raises:
        UnsupportedError: From the forward: a layer's batch dimension cannot be proven.
    """
    if len(set(rows.names)) < 2:
        yield
        return
    prover = _Prover(root, rows, layouts)
    with contextlib.ExitStack() as stack:
        for handle in prover.install():
            stack.callback(handle)
        yield


@dataclasses.dataclass
class _Prover:
    """The hooks of one `rows` block."""

    root: nn.Module
    rows: Rows
    layouts: dict[str, Layout]
    depth: int = 0
    probing: bool = False
    sketches: dict[str, list[Tensor]] = dataclasses.field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    transposed: set[int] = dataclasses.field(default_factory=set)

    def __post_init__(self) -> None:
        names = {name for name in self.rows.names if name is not None}
        blocks = routed_blocks(self.root)
        inside = {id(m) for block in blocks.values() for m in block.modules()}
        self.blocks = {
            path: block
            for path, block in blocks.items()
            if any(names & set(layer.vera) for layer in vera_layers(block))
        }
        self.layers = {
            layer.name: layer
            for layer in vera_layers(self.root)
            if names & set(layer.vera) and id(layer) not in inside
        }

    def install(self) -> list[Callable[[], None]]:
        """Put the hooks in; returns what takes them out."""
        handles: list[Callable[[], None]] = []
        for module in _callers(self.root, [*self.layers.values(), *self.blocks.values()]):
            handles.append(module.register_forward_pre_hook(self._enter, with_kwargs=True).remove)
            handles.append(module.register_forward_hook(self._leave, always_call=True).remove)
        for layer in self.layers.values():
            handles.append(
                layer.register_forward_pre_hook(self._before_layer, with_kwargs=True).remove
            )
            handles.append(layer.register_forward_hook(self._after_layer).remove)
        for path, block in self.blocks.items():
            handles.append(self._split_block(path, block))
        return handles

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.depth += 1
        if self.depth > 1 or self.probing or torch.compiler.is_compiling():
            return
        self._prove(module, args, kwargs)

    def _leave(self, module: nn.Module, args: object, output: object) -> None:
        self.depth -= 1

    def _before_layer(
        self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        assert isinstance(layer, VeraLayer)
        if self.probing:
            self._record(layer.name, _first_tensor(args, kwargs), isinstance(layer, VeraLinear))
            return None
        if self.depth == 0 or layer.rows is not self.rows:
            return None  # called on its own, where dimension 0 is the batch; or in an inner block
        layout = self.layouts.get(layer.name, "unknown")
        if layout == "first":
            return None
        x = _first_tensor(args, kwargs)
        if layout == "second" and x is not None and isinstance(layer, VeraLinear):
            self.transposed.add(id(layer))
            return (x.transpose(0, 1),), {}
        if x is not None:
            self.rows.positions(x.shape[0], layer.name)  # a batch of another size has its error
        raise self._unproven(layer.name, () if x is None else tuple(x.shape))

    def _after_layer(self, layer: nn.Module, args: object, output: Any) -> Any:
        if id(layer) not in self.transposed:
            return None
        self.transposed.discard(id(layer))
        return output.transpose(0, 1)

    def _prove(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        inside = {id(m) for m in module.modules()}
        unproven = [
            name
            for name, subject in (*self.layers.items(), *self.blocks.items())
            if id(subject) in inside and name not in self.layouts
        ]
        batch = _batch_size(args, kwargs)
        if not unproven or batch is None or batch < 2 or batch % len(self.rows.names):
            return
        plain = self._run(module, args, kwargs, None, batch)
        rolled = self._run(module, args, kwargs, _roll(batch), batch)
        for name in unproven:
            before, after = plain.get(name, []), rolled.get(name, [])
            if before:
                self.layouts[name] = _layout(before, after, batch)
        for name in unproven:
            if self.layouts.get(name) == "unknown":
                del self.layouts[name]
                raise self._unproven(name, self.shapes.get(name, ()))

    def _run(
        self,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        order: Tensor | None,
        batch: int,
    ) -> dict[str, list[Tensor]]:
        """Sketches of each layer's inputs in a run of the base model, rows in the given order."""
        args = tuple(_reorder(value, order, batch, "") for value in args)
        kwargs = {key: _reorder(value, order, batch, key) for key, value in kwargs.items()}
        self.sketches = {}
        layers = vera_layers(self.root)
        modes = [(m, m.training) for m in module.modules()]
        before = [(layer.rows, layer.active) for layer in layers]
        self.probing = True
        try:
            for m, _ in modes:
                m.training = False
            for layer in layers:
                layer.rows, layer.active = None, None
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                module(*args, **kwargs)
        finally:
            self.probing = False
            for m, mode in modes:
                m.training = mode
            for layer, (rows, name) in zip(layers, before, strict=True):
                layer.rows, layer.active = rows, name
        return self.sketches

    def _record(self, name: str, x: Tensor | None, keep_dimensions: bool) -> None:
        if x is None or not x.is_floating_point():
            return
        self.shapes[name] = tuple(x.shape)
        self.sketches.setdefault(name, []).append(_sketch(x, keep_dimensions))

    def _unproven(self, name: str, shape: tuple[int, ...]) -> UnsupportedError:
        return UnsupportedError(
            f"layer '{name}' cannot mix adapters: which part of its input {shape} belongs to which "
            "row of the batch cannot be proven; use one adapter for each batch, or exclude the "
            "layer"
        )

    def _split_block(self, path: str, block: nn.Module) -> Callable[[], None]:
        """Let a block of routed experts run once for each adapter; returns what undoes it."""
        forward = block.forward

        def split(*args: Any, **kwargs: Any) -> Any:
            if self.probing:
                self._record(path, _first_tensor(args, kwargs), True)
                return forward(*args, **kwargs)
            if not any(layer.rows is self.rows for layer in vera_layers(block)):
                return forward(*args, **kwargs)
            if self.depth and self.layouts.get(path) != "first":
                x = _first_tensor(args, kwargs)
                raise self._unproven(path, () if x is None else tuple(x.shape))
            return _by_adapter(path, block, self.rows, forward, args, kwargs)

        previous = block.__dict__.get("forward")
        block.forward = split  # type: ignore[method-assign]

        def undo() -> None:
            if previous is None:
                del block.forward
            else:
                block.forward = previous  # type: ignore[method-assign]

        return undo


def routed_blocks(root: nn.Module) -> dict[str, nn.Module]:
    """Return the modules that route tokens to a list of expert modules, by path.

    A list is one of experts if its name says so; shared experts see every token in place.
    """
    out = {}
    for path, module in root.named_modules():
        parent, _, name = path.rpartition(".")
        is_list = isinstance(module, nn.ModuleList | nn.ModuleDict)
        if is_list and "expert" in name.lower() and "shared" not in name.lower():
            out[parent] = root.get_submodule(parent)
    return {
        path: block
        for path, block in out.items()
        if not any(path.startswith(f"{other}.") for other in out)
    }


def _callers(root: nn.Module, subjects: Sequence[nn.Module]) -> list[nn.Module]:
    """The modules that hold an adapted layer, which may be called on their own."""
    wanted = {id(subject) for subject in subjects}
    return [
        module
        for module in root.modules()
        if id(module) not in wanted
        and not isinstance(module, nn.ModuleList | nn.ModuleDict | VeraLayer)
        and any(id(inner) in wanted for inner in module.modules())
    ]


def _by_adapter(
    path: str,
    block: nn.Module,
    rows: Rows,
    forward: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> Any:
    """One call of the block for each adapter, on its rows alone."""
    x = _first_tensor(args, kwargs)
    assert x is not None
    batch = x.shape[0]
    positions: dict[str | None, list[int]] = {}
    positions.update(rows.positions(batch, path))
    taken = {i for found in positions.values() for i in found}
    positions[None] = [i for i in range(batch) if i not in taken]
    layers = vera_layers(block)
    before = [(layer.rows, layer.active) for layer in layers]
    outputs, order = [], []
    try:
        for name, found in positions.items():
            if not found:
                continue
            index = torch.tensor(found, device=x.device)
            for layer in layers:
                layer.rows, layer.active = None, name
            part = [_reorder(value, index, batch, "") for value in args]
            named = {key: _reorder(value, index, batch, key) for key, value in kwargs.items()}
            outputs.append(forward(*part, **named))
            order.append(index)
    finally:
        for layer, (mixed, active) in zip(layers, before, strict=True):
            layer.rows, layer.active = mixed, active
    return _join(outputs, torch.cat(order).argsort(), [len(index) for index in order], path)


def _join(outputs: list[Any], back: Tensor, sizes: list[int], path: str) -> Any:
    """The outputs of all adapters, rows back in the order of the batch."""
    first = outputs[0]
    if first is None:
        return None
    if isinstance(first, tuple | list):
        pieces = zip(*outputs, strict=True)
        return type(first)(_join(list(piece), back, sizes, path) for piece in pieces)
    counts = [output.shape[0] // size for output, size in zip(outputs, sizes, strict=True)]
    if first.dim() == 0 or len(set(counts)) > 1 or counts[0] * sizes[0] != first.shape[0]:
        raise UnsupportedError(
            f"the experts of '{path}' cannot mix adapters: an output of shape "
            f"{tuple(first.shape)} has no batch dimension; use one adapter for each batch"
        )
    joined = torch.cat(outputs)
    whole = joined.view(len(back), counts[0], *joined.shape[1:]).index_select(0, back)
    return whole.flatten(0, 1)


def _first_tensor(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
    return next((v for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.dim()), None)


def _batch_size(args: Sequence[Any], kwargs: Mapping[str, Any]) -> int | None:
    for name in _MAIN_INPUTS:
        if isinstance(kwargs.get(name), Tensor):
            return int(kwargs[name].shape[0])
    x = _first_tensor(args, kwargs)
    return None if x is None else x.shape[0]


def _roll(batch: int) -> Tensor:
    return torch.arange(batch).roll(1)


def _reorder(value: Any, order: Tensor | None, batch: int, name: str) -> Any:
    """A copy of an input with the batch's rows in another order; other inputs as they are."""
    if isinstance(value, Tensor):
        if order is None or name in _NOT_BATCHED:
            return value
        axis = 0
        if name == "position_ids" and value.dim() == 3:
            axis = 1  # (3, batch, sequence): multimodal rotary positions
        if value.dim() <= axis or value.shape[axis] != batch:
            return value
        return value.index_select(axis, order.to(value.device))
    if isinstance(value, Mapping):
        items = {key: _reorder(v, order, batch, str(key)) for key, v in value.items()}
        return items if type(value) is dict else type(value)(**items)
    if isinstance(value, tuple | list) and type(value) in (tuple, list):
        return type(value)(_reorder(v, order, batch, name) for v in value)
    if hasattr(value, "batch_select_indices"):  # transformers' caches, which a forward changes
        cache = copy.deepcopy(value)
        if order is not None and cache.get_seq_length():
            cache.batch_select_indices(order)
        return cache
    return value


def _sketch(x: Tensor, keep_dimensions: bool) -> Tensor:
    """X with its features projected to two numbers; all dimensions but 0 are features otherwise.

    The mean over all positions is taken off first: what they have in common tells nothing.
    """
    flat = x.detach().float() if keep_dimensions else x.detach().float().flatten(1)
    centred = flat - flat.flatten(0, -2).mean(0)
    steps = torch.arange(flat.shape[-1], device=x.device, dtype=torch.float32)
    directions = torch.stack([torch.cos(steps * 2.399), torch.sin(steps * 1.117 + 0.5)], dim=-1)
    tolerance = _TOLERANCE if x.dtype in (torch.float32, torch.float64) else 5 * _TOLERANCE
    size = centred.square().mean().sqrt().clamp(min=1e-12) * flat.shape[-1] ** 0.5
    return (centred @ directions) / (size * tolerance)


def _layout(before: list[Tensor], after: list[Tensor], batch: int) -> Layout:
    """The one dimension along which every input of a layer was rolled with the batch."""
    if len(before) != len(after) or any(
        a.shape != b.shape for a, b in zip(before, after, strict=True)
    ):
        return "unknown"
    calls = list(zip(before, after, strict=True))
    first = all(_rolled(a, b, 0, batch) for a, b in calls)
    second = all(_rolled(a, b, 1, batch) for a, b in calls)
    if first and second:
        return "unknown"  # the input does not tell the two apart
    return "first" if first else "second" if second else "unknown"


def _rolled(a: Tensor, b: Tensor, axis: int, batch: int) -> bool:
    """Whether b is a, rolled by one row of the batch along an axis that repeats rows in place."""
    if a.dim() - 1 <= axis or a.shape[axis] % batch or not a.shape[axis]:
        return False
    if axis == 1 and a.shape[axis] != batch:
        return False
    shift = a.shape[axis] // batch
    return torch.allclose(a.roll(shift, axis), b, rtol=0.0, atol=1.0)
