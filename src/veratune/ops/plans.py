"""Plans: the orders in which VeRA's products give the same numbers, their costs, and the cheapest.

One layer: x (T, n), W (m, n), A (r, n), B (m, r), G (T, m) the gradient of the output. Both vector
gradients come from one small matrix P = Gᵀ (x Aᵀ) of shape (m, r):

    grad d = bᵀ (B ∘ P)        grad b = (B ∘ P) d

    plan        output                       gradient to x               P             kept
    factored    W x + b (B (d (A x)))        G W + ((G b) B d) A         Gᵀ (x Aᵀ)     x Aᵀ
    projected   (W + ΔW) x                   G (W + ΔW)                  Gᵀ (x Aᵀ)     x Aᵀ, W + ΔW
    merged      (W + ΔW) x                   G (W + ΔW)                  (Gᵀ x) Aᵀ     x, W + ΔW
    dense       W x + ΔW x                   G W + G ΔW                  (Gᵀ x) Aᵀ     x, ΔW

Nothing of size (T, m) is kept for the backward pass, with one exception: where it is small beside W
(`FEW`), "factored" keeps x Aᵀ and B (d (A x)), which saves the product for P. W + ΔW is computed
again in the backward pass where keeping it takes too much memory (`KEEP`) or saves too little time
(`CHEAP`). "projected" and "merged" add ΔW to W: they need a readable W in the precision of the
product, and 32 bits or more, since fewer would round a small ΔW away.

Block matrices (`block_linear`) have the plans factored, projected and merged: W + ΔW costs one pass
over W there, and is never kept. Their P is a batch of small products, and A x or x is kept.
"""

import math
from typing import NamedTuple

import torch

from veratune.config import PLANS
from veratune.ops.calibration import ACCELERATOR, CPU, Machine, read_calibration

# W + ΔW is kept for the backward pass while it is at most this part of T (r + m), which the
# textbook order keeps, and unless computing it again takes less than CHEAP of the frozen layer's
# own time: m n r beside 2 T m n.
KEEP = 0.5
CHEAP = 0.05

# "factored" keeps both its products while T (r + m) is at most this many times m n.
FEW = 2.0

# A pointwise operation that transposes takes as long as this many others.
TRANSPOSED = 5


class Call(NamedTuple):
    """One use of one layer.

    Args:
        T: Rows of x.
        m: Output features.
        n: Input features.
        r: Rank.
        size: Bytes of a number.
        grad_x: Whether the gradient of x is wanted.
        grad_vectors: Whether the gradients of d or b are wanted.
        in_weight: Whether W can be read and ΔW added to it.
        own_weight: Whether W x is computed by the same call, so that sums are taken in place.
        grid_rows: q, the rows of the grid of inner values of block matrices; 0 for dense ones.
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
    grid_rows: int = 0


class PlanChoice(NamedTuple):
    """A plan with its memory policy.

    Args:
        plan: One of PLANS.
        keep: Whether its intermediate (W + ΔW, ΔW, or B (d (A x))) is kept for the backward pass.
    """

    plan: str
    keep: bool


class Planner:
    """Cheapest plans, remembered by call and device, and the machine figures they rest on.

    Args:
        max_choices: Choices to remember; above it all are forgotten.
    """

    def __init__(self, max_choices: int = 10_000) -> None:
        self._machines: dict[str, Machine] = {}
        self._choices: dict[tuple[Call, str], PlanChoice] = {}
        self._max_choices = max_choices

    def choose(self, call: Call, device: torch.device) -> PlanChoice:
        """Return the cheapest plan that the call allows; the same choice for the same call."""
        if torch.compiler.is_compiling():  # sizes may be symbols there
            return cheapest(call, self.machine(device))
        key = (call, device.type)
        choice = self._choices.get(key)
        if choice is None:
            if len(self._choices) >= self._max_choices:
                self._choices.clear()
            choice = self._choices[key] = cheapest(call, self.machine(device))
        return choice

    def machine(self, device: torch.device) -> Machine:
        """Return a device's figures: this machine's calibration, or the built-in ones."""
        kind = device.type
        if kind not in self._machines:
            built_in = CPU if kind == "cpu" else ACCELERATOR
            self._machines[kind] = read_calibration().get(kind) or built_in
        return self._machines[kind]

    def clear(self) -> None:
        """Forget all choices and figures; the calibration is read again."""
        self._machines.clear()
        self._choices.clear()


PLANNER = Planner()


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
    """Whether "auto" may take a plan: ΔW alone must fit the memory that it may be kept in."""
    if call.grid_rows:  # of z and x, the smaller one is kept
        smaller = "projected" if call.r <= call.n else "merged"
        return plan == "factored" or (call.in_weight and plan == smaller)
    if plan in ("projected", "merged"):
        return call.in_weight
    return plan == "factored" or not call.grad_vectors or _affordable(call)


def with_memory_policy(call: Call, plan: str) -> PlanChoice:
    """A plan with its memory policy for this call."""
    if call.grid_rows:
        return PlanChoice(plan, False)
    if plan == "factored":
        return PlanChoice(
            plan, call.grad_vectors and call.T * (call.r + call.m) <= FEW * call.m * call.n
        )
    return PlanChoice(plan, call.grad_x and _affordable(call) and call.r > CHEAP * 2 * call.T)


def _affordable(call: Call) -> bool:
    return call.m * call.n <= KEEP * call.T * (call.r + call.m)


def seconds(call: Call, choice: PlanChoice, machine: Machine) -> float:
    """Estimate a call's time beyond the frozen layer's own, forward and backward together."""
    cost = _Cost(call.size, machine)
    if call.grid_rows:
        _add_blocks(cost, call, choice.plan)
    elif choice.plan == "factored":
        _add_factored(cost, call, choice.keep)
    else:
        _add_merged(cost, call, choice)
    return cost.seconds


class _Cost:
    """Sum of the times of products and pointwise operations on one machine."""

    def __init__(self, size: int, machine: Machine) -> None:
        self.seconds, self.size, self.machine = 0.0, size, machine

    def product(self, rows: int, columns: int, inner: int, in_place: bool = False) -> None:
        """A (rows, inner) times (inner, columns) product; in_place: added to existing memory."""
        result = self.size * rows * columns
        self.seconds += 2 * rows * columns * inner / self.machine.flops + self.machine.call
        self.seconds += self.size * (rows * inner + inner * columns) / self.machine.read
        self.seconds += result / self.machine.read if in_place else self._write(result)

    def products(self, batch: int, rows: int, columns: int, inner: int) -> None:
        """A batch of small (rows, inner) times (inner, columns) products: a quarter of the rate."""
        values = batch * (rows * inner + inner * columns)
        self.seconds += 8 * batch * rows * columns * inner / self.machine.flops + self.machine.call
        self.seconds += self.size * values / self.machine.read
        self.seconds += self._write(self.size * batch * rows * columns)

    def pointwise(self, rows: int, columns: int, passes: int = 1) -> None:
        """Pointwise operations that each write (rows, columns)."""
        self.seconds += passes * (self._write(self.size * rows * columns) + self.machine.call)

    def _write(self, count: float) -> float:
        machine = self.machine
        return count / (machine.write_large if count > machine.large else machine.write)


def _add_factored(cost: _Cost, call: Call, keep: bool) -> None:
    T, m, n, r = call.T, call.m, call.n, call.r
    cost.product(T, r, n)
    if keep:
        cost.pointwise(T, r)
        cost.product(T, m, r)
        cost.pointwise(T, m, 3)
        cost.product(T, r, m)
        cost.pointwise(T, r, 2)
    else:
        cost.pointwise(m, r, 2)
        cost.product(T, m, r, in_place=call.own_weight)
        if call.grad_x:
            cost.pointwise(m, r, 2)
            cost.product(T, r, m)
        if call.grad_vectors:
            cost.product(m, r, T)
            cost.pointwise(m, r)
    if call.grad_x:
        cost.product(T, n, r, in_place=call.own_weight)
    if not call.own_weight:
        cost.pointwise(T, m)
        cost.pointwise(T, n if call.grad_x else 0)


def _add_blocks(cost: _Cost, call: Call, plan: str) -> None:
    T, m, n, r, q = call.T, call.m, call.n, call.r, call.grid_rows
    k = math.ceil(r / q)
    c, s = math.ceil(n / q), math.ceil(m / k)
    if plan == "factored":
        cost.products(q, k, T, c)
        cost.pointwise(T, r)
        cost.products(1, s, k * T, q)
        cost.pointwise(T, m, TRANSPOSED if call.own_weight else TRANSPOSED + 1)
        if call.grad_x:
            cost.pointwise(T, m)
            cost.products(1, q, k * T, s)
            cost.pointwise(T, r)
            cost.products(q, T, c, k)
            cost.pointwise(T, n)
    else:
        for _ in range(2 if call.grad_x else 1):
            cost.pointwise(m, q, 3)
            cost.seconds += call.size * m * n / cost.machine.write_large + cost.machine.call
    if call.grad_vectors:
        if plan != "factored" or r > n:
            cost.products(q, k, T, c)
        cost.pointwise(T, m, TRANSPOSED)
        cost.products(k, q, s, T)
        cost.pointwise(m, q, 4)


def _add_merged(cost: _Cost, call: Call, choice: PlanChoice) -> None:
    T, m, n, r = call.T, call.m, call.n, call.r
    cost.pointwise(m, r, 2)
    cost.product(m, n, r)
    if not choice.keep and call.grad_x:
        cost.pointwise(m, r, 2)
        cost.product(m, n, r)
    if choice.plan == "dense":
        cost.product(T, m, n)
        cost.pointwise(T, m)
        if call.grad_x:
            cost.product(T, n, m)
            cost.pointwise(T, n)
    if call.grad_vectors:
        if choice.plan == "projected":
            cost.product(T, r, n)
            cost.product(m, r, T)
        else:
            cost.product(m, n, T)
            cost.product(m, r, n)
        cost.pointwise(m, r)
