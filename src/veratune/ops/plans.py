"""In which order VeRA's products are taken: the orders that give the same numbers, what each costs, and which is cheapest.

One layer: x (T, n), W (m, n), A (r, n), B (m, r), G (T, m) the gradient of the output. Both vector gradients
come from one small matrix P = Gᵀ (x Aᵀ) of shape (m, r):

    grad d = bᵀ (B ∘ P)        grad b = (B ∘ P) d

    plan        output                       gradient to x               P             kept for the backward
    factored    W x + b (B (d (A x)))        G W + ((G b) B d) A         Gᵀ (x Aᵀ)     x Aᵀ
    projected   (W + ΔW) x                   G (W + ΔW)                  Gᵀ (x Aᵀ)     x Aᵀ, and W + ΔW
    merged      (W + ΔW) x                   G (W + ΔW)                  (Gᵀ x) Aᵀ     x, and W + ΔW
    dense       W x + ΔW x                   G W + G ΔW                  (Gᵀ x) Aᵀ     x, and ΔW

Nothing of size (T, m) is kept, with one exception: where that is small beside W (see `FEW`), "factored" keeps x Aᵀ and
B (d (A x)) as they come, which saves the product for P. W + ΔW is made again in the backward where keeping it would take too much
memory or saves too little time (see `KEEP` and `CHEAP`). "projected" and "merged" put ΔW into W: they need a W that can be read, in the precision of the product,
and 32 bits or more, since fewer would round a small ΔW away.
"""

import dataclasses
import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from veratune.config import PLANS
from veratune.errors import DataError

# W + ΔW is kept for the backward while it is at most this part of what the textbook order keeps, T (r + m), and unless to
# make it again takes less than this part of the frozen layer's own time: m n r beside 2 T m n.
KEEP = 0.5
CHEAP = 0.05

# Rows are few, and "factored" keeps both its products, while T (r + m) is at most this many times m n.
FEW = 2.0

_REMEMBERED = 10_000  # choices


@dataclasses.dataclass(frozen=True)
class Machine:
    """What a device does in a second, as far as the plans care.

    flops: of a large matrix product; read: bytes a product streams through; write: bytes of new memory written by one operation,
    and `write_large` the same for results over `large` bytes (glibc maps and clears those anew each time); call: seconds that
    one operation takes whatever its size.
    """

    flops: float
    read: float
    write: float
    write_large: float
    large: float
    call: float


# From products and writes timed on two cores of an AMD EPYC; those of an accelerator are round figures of its kind, not measured.
CPU = Machine(flops=1.9e11, read=6e10, write=2.5e10, write_large=3e9, large=3.2e7, call=4e-6)
ACCELERATOR = Machine(
    flops=6e13, read=2e12, write=2e12, write_large=2e12, large=float("inf"), call=6e-6
)

_measured: dict[str, Machine] = {}
_chosen: dict[tuple["Call", str], "PlanChoice"] = {}


class Call(NamedTuple):
    """One use of one layer.

    T: rows of x; m, n, r: the layer's sizes; size: bytes of a number. grad_x, grad_vectors: which gradients will be asked for.
    in_weight: whether W can be read and take ΔW in; own_weight: whether W x is computed here, so that
    sums go into place.
    """

    T: int
    m: int
    n: int
    r: int
    size: int = 4
    grad_x: bool = True
    grad_vectors: bool = True
    in_weight: bool = True
    own_weight: bool = True


class PlanChoice(NamedTuple):
    """plan: one of PLANS; keep: whether the backward finds its intermediate (W + ΔW, ΔW, or B (d (A x))) kept."""

    plan: str
    keep: bool


def choose_plan(call: Call, device: torch.device) -> PlanChoice:
    """The cheapest plan that the call allows on a device; the same answer for the same call."""
    if torch.compiler.is_compiling():  # sizes may be symbols there
        return cheapest(call, machine_of(device))
    key = (call, device.type)
    found = _chosen.get(key)
    if found is None:
        if len(_chosen) >= _REMEMBERED:
            _chosen.clear()
        found = _chosen[key] = cheapest(call, machine_of(device))
    return found


def cheapest(call: Call, machine: Machine) -> PlanChoice:
    """The plan with the fewest `seconds` among those that the call allows."""
    best, least = PlanChoice("factored", False), float("inf")
    for plan in PLANS:
        if allowed(call, plan):
            choice = with_memory_policy(call, plan)
            cost = seconds(call, choice, machine)
            if cost < least:
                best, least = choice, cost
    return best


def allowed(call: Call, plan: str) -> bool:
    """Whether a plan may be chosen unasked: ΔW on its own must not take more memory than it may be kept in."""
    if plan in ("projected", "merged"):
        return call.in_weight
    return plan == "factored" or not call.grad_vectors or _affordable(call)


def with_memory_policy(call: Call, plan: str) -> PlanChoice:
    """A plan with its memory policy for this call."""
    if plan == "factored":
        return PlanChoice(
            plan, call.grad_vectors and call.T * (call.r + call.m) <= FEW * call.m * call.n
        )
    return PlanChoice(plan, call.grad_x and _affordable(call) and call.r > CHEAP * 2 * call.T)


def _affordable(call: Call) -> bool:
    return call.m * call.n <= KEEP * call.T * (call.r + call.m)


def seconds(call: Call, choice: PlanChoice, machine: Machine) -> float:
    """Time of a training or inference call beyond the frozen layer's own, forward and backward together."""
    T, m, n, r = call.T, call.m, call.n, call.r
    total = 0.0

    def product(rows: int, columns: int, inner: int, into: bool = False) -> None:
        nonlocal total
        total += 2 * rows * columns * inner / machine.flops + machine.call
        total += call.size * (rows * inner + inner * columns) / machine.read
        total += (
            call.size * rows * columns / machine.read
            if into
            else _written(call.size * rows * columns, machine)
        )

    def pointwise(rows: int, columns: int, passes: int = 1) -> None:
        nonlocal total
        total += passes * (_written(call.size * rows * columns, machine) + machine.call)

    vectors = call.grad_vectors
    if choice.plan == "factored":
        product(T, r, n)
        if choice.keep:
            pointwise(T, r)
            product(T, m, r)
            pointwise(T, m, 3)
            product(T, r, m)
            pointwise(T, r, 2)
        else:
            pointwise(m, r, 2)
            product(T, m, r, into=call.own_weight)
            if call.grad_x:
                pointwise(m, r, 2)
                product(T, r, m)
            if vectors:
                product(m, r, T)
                pointwise(m, r)
        if call.grad_x:
            product(T, n, r, into=call.own_weight)
        if not call.own_weight:
            pointwise(T, m)
            pointwise(T, n if call.grad_x else 0)
        return total
    pointwise(m, r, 2)
    product(m, n, r)
    if not choice.keep and call.grad_x:
        pointwise(m, r, 2)
        product(m, n, r)
    if choice.plan == "dense":
        product(T, m, n)
        pointwise(T, m)
        if call.grad_x:
            product(T, n, m)
            pointwise(T, n)
    if choice.plan == "projected":
        if vectors:
            product(T, r, n)
            product(m, r, T)
    elif vectors:
        product(m, n, T)
        product(m, r, n)
    if vectors:
        pointwise(m, r)
    return total


def _written(count: float, machine: Machine) -> float:
    return count / (machine.write_large if count > machine.large else machine.write)


def machine_of(device: torch.device) -> Machine:
    """The figures of a device: what `veratune calibrate` stored on this machine, or those built in."""
    kind = device.type
    if kind not in _measured:
        _measured[kind] = read_calibration().get(kind) or (CPU if kind == "cpu" else ACCELERATOR)
    return _measured[kind]


def calibration_file() -> Path:
    """Where the calibration of this machine is stored: $VERATUNE_CACHE, or veratune in the user's cache folder."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return (
        Path(os.environ.get("VERATUNE_CACHE") or os.path.join(cache, "veratune"))
        / f"machine-{platform.node() or 'here'}.json"
    )


def read_calibration() -> dict[str, Machine]:
    """The stored figures, by kind of device; none if there is no file.

    Raises DataError naming the file when it holds anything else.
    """
    path = calibration_file()
    try:
        found = json.loads(path.read_text())
        return {kind: _machine(figures) for kind, figures in found.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path}: no calibration of a machine ({error}); delete it or run veratune calibrate"
        ) from None


def _machine(figures: Mapping[str, float]) -> Machine:
    made = Machine(**{name: float(value) for name, value in figures.items()})
    if not all(value > 0 for value in dataclasses.astuple(made)):
        raise ValueError("figures must be above 0")
    return made


def forget() -> None:
    """Read the calibration again at the next call."""
    _measured.clear()
    _chosen.clear()
