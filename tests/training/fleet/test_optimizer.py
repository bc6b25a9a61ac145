import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import get_scheduler

from veratune.training.fleet.optimizer import StackedAdamW, clip_rows, schedule


@given(
    decay=st.sampled_from([0.0, 0.01]),
    updates=st.lists(st.sets(st.integers(0, 3), min_size=1), min_size=1, max_size=8),
)
def test_every_row_is_updated_as_by_an_adamw_of_its_own(decay, updates):
    torch.manual_seed(0)
    values = torch.randn(4, 7)
    rates = torch.rand(7)
    alone = [torch.nn.Parameter(row.clone()) for row in values]
    groups = [torch.optim.AdamW([p], lr=1.0, weight_decay=decay) for p in alone]
    stacked = StackedAdamW(4, 7, weight_decay=decay)
    counts = [0] * 4
    for rows in updates:
        chosen = sorted(rows)
        grads = torch.randn(len(chosen), 7)
        for k, row in enumerate(chosen):
            counts[row] += 1
            # One learning rate per value: a parameter group has one, so each value is its own step.
            before = alone[row].detach().clone()
            alone[row].grad = grads[k].clone()
            groups[row].step()
            with torch.no_grad():
                alone[row].copy_(before + (alone[row] - before) * rates)
        steps = torch.tensor([counts[row] for row in chosen])
        stacked.step(values, torch.tensor(chosen), grads, steps, rates)
    torch.testing.assert_close(
        values, torch.stack([p.detach() for p in alone]), rtol=2e-5, atol=2e-6
    )


def test_a_row_that_enters_starts_without_history():
    stacked = StackedAdamW(2, 3)
    values = torch.zeros(2, 3)
    ones = torch.ones(1, 3)
    stacked.step(values, torch.tensor([1]), ones, torch.tensor([1]), torch.ones(3))
    stacked.reset(1)
    assert not stacked.exp_avg[1].any()
    assert not stacked.exp_avg_sq[1].any()


@given(st.floats(0.1, 10), st.floats(0.01, 5))
def test_rows_are_clipped_as_torch_clips_a_model(size, limit):
    torch.manual_seed(1)
    grads = torch.randn(3, 5) * size
    wanted, norms = [], []
    for row in grads:
        parameter = torch.nn.Parameter(torch.zeros(5))
        parameter.grad = row.clone()
        norms.append(torch.nn.utils.clip_grad_norm_([parameter], limit))
        wanted.append(parameter.grad)
    assert torch.allclose(clip_rows(grads, limit), torch.stack(norms))
    assert torch.allclose(grads, torch.stack(wanted))


def test_no_limit_leaves_gradients_alone():
    grads = torch.full((1, 4), 100.0)
    assert clip_rows(grads, 0.0).item() == pytest.approx(200.0)
    assert (grads == 100).all()


@pytest.mark.parametrize("name", ["linear", "cosine", "constant_with_warmup"])
@pytest.mark.parametrize("warmup", [0, 0.06, 0.5, 3])
@pytest.mark.parametrize("total", [1, 7, 50])
def test_the_schedule_is_that_of_transformers(name, warmup, total):
    import math

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    rising = math.ceil(total * warmup) if warmup < 1 else warmup
    rising = min(rising, total - 1)  # the last step is no warm-up
    scheduler = get_scheduler(name, optimizer, rising, total)
    factor = schedule(name, warmup)
    for step in range(total):
        assert factor(step, total) == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
