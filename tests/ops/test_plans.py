import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from veratune.config import PLANS
from veratune.errors import DataError
from veratune.ops import plans
from veratune.ops.calibration import Machine, calibration_file, read_calibration
from veratune.ops.plans import (
    CPU,
    Call,
    PlanChoice,
    cheapest,
    seconds,
    with_memory_policy,
)

sizes = st.integers(1, 4096)


@given(sizes, sizes, sizes, st.integers(1, 2048), st.booleans(), st.booleans(), st.booleans())
def test_the_cheapest_is_taken_among_what_is_allowed(T, m, n, r, grad_x, grad_vectors, in_weight):
    call = Call(
        T,
        m,
        n,
        r,
        grad_x=grad_x,
        grad_vectors=grad_vectors,
        in_weight=in_weight,
        own_weight=in_weight,
    )
    choice = cheapest(call, CPU)
    assert choice == with_memory_policy(call, choice.plan)
    for plan in PLANS:
        if plans.allowed(call, plan):
            assert seconds(call, choice, CPU) <= seconds(call, with_memory_policy(call, plan), CPU)
    if not in_weight:
        assert choice.plan in ("factored", "dense")


def test_sizes_whose_best_order_is_known_from_measurement():
    """Cells of the layer grid in which one plan won clearly on two cores."""
    assert cheapest(Call(2048, 768, 768, 1024), CPU).plan == "merged"
    assert cheapest(Call(2048, 768, 768, 256), CPU).plan == "projected"
    assert cheapest(Call(64, 768, 768, 1024), CPU) == PlanChoice("factored", True)
    assert cheapest(Call(2048, 2048, 2048, 1024), CPU).plan == "projected"
    assert (
        cheapest(Call(1, 768, 768, 256, grad_x=False, grad_vectors=False), CPU).plan == "factored"
    )


def test_blocks_go_into_the_weight_from_some_hundred_rows_on():
    """Cells of the layer grid in which one plan won clearly on one core."""
    assert cheapest(Call(2048, 768, 768, 768, grid_rows=24), CPU) == PlanChoice("projected", False)
    assert cheapest(Call(2048, 768, 768, 1024, grid_rows=32), CPU) == PlanChoice("merged", False)
    assert cheapest(Call(64, 768, 768, 1024, grid_rows=32), CPU).plan == "factored"
    low = Call(2048, 768, 768, 768, size=2, in_weight=False, grid_rows=24)
    assert cheapest(low, CPU).plan == "factored"


@given(sizes, sizes, sizes, st.integers(1, 2048), st.sampled_from(PLANS))
def test_what_is_kept_is_bounded(T, m, n, r, plan):
    call = Call(T, m, n, r)
    choice = with_memory_policy(call, plan)
    if choice.keep and plan == "factored":
        assert T * (r + m) <= plans.FEW * m * n
    elif choice.keep:
        assert m * n <= plans.KEEP * T * (r + m)


def test_a_measured_machine_goes_before_the_built_in_one(monkeypatch, tmp_path):
    call, cpu = Call(2048, 768, 768, 1024), torch.device("cpu")
    plans.PLANNER.clear()
    assert plans.PLANNER.choose(call, cpu) is plans.PLANNER.choose(call, cpu)
    assert plans.PLANNER.machine(cpu) == CPU
    monkeypatch.setenv("VERATUNE_CACHE", str(tmp_path))
    figures = {
        "flops": 1e9,
        "read": 2e9,
        "write": 3e9,
        "write_large": 4e9,
        "large": 5e9,
        "call": 6e-6,
    }
    calibration_file().write_text(json.dumps({"cpu": figures}))
    assert plans.PLANNER.machine(cpu) == CPU
    plans.PLANNER.clear()
    assert plans.PLANNER.machine(cpu) == Machine(**figures)
    assert plans.PLANNER.choose(call, cpu) == cheapest(call, Machine(**figures))
    monkeypatch.undo()
    plans.PLANNER.clear()


@pytest.mark.parametrize("text", ["no json", "[1]", '{"cpu": {"flops": 1}}', '{"cpu": {"speed": 1}}',
    '{"cpu": {"flops": 0, "read": 1, "write": 1, "write_large": 1, "large": 1, "call": 1}}'])  # fmt: skip
def test_a_calibration_that_is_none_is_named(text, monkeypatch, tmp_path):
    monkeypatch.setenv("VERATUNE_CACHE", str(tmp_path))
    calibration_file().write_text(text)
    with pytest.raises(
        DataError, match="no calibration of a machine .* delete it or run veratune calibrate"
    ):
        read_calibration()


@settings(max_examples=10)
@given(st.sampled_from(PLANS))
def test_more_rows_never_cost_less(plan):
    costs = [
        seconds(Call(T, 768, 768, 256), PlanChoice(plan, False), CPU) for T in (1, 16, 256, 4096)
    ]
    assert costs == sorted(costs)
