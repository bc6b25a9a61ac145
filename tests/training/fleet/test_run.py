import math

from hypothesis import given
from hypothesis import strategies as st

from veratune.training.fleet.run import TenantRun, pack, total_steps


def run_of(count: int, batch: int, seed: int = 0) -> TenantRun:
    examples = [{"input_ids": [i]} for i in range(count)]
    return TenantRun("ann", 0, examples, (), batch, total_steps(count, batch, 2, 0), seed)


@given(st.integers(1, 20), st.integers(1, 8), st.integers(0, 5))
def test_every_epoch_shows_every_example_once(count, batch, seed):
    run = run_of(count, batch, seed)
    for epoch in (1, 2):
        seen = []
        for _ in range(run.steps_per_epoch):
            seen += [example["input_ids"][0] for example in run.next_batch()]
            run.step += 1
        assert sorted(seen) == list(range(count))
        assert run.at_epoch_end
        assert run.done == (epoch == 2)


def test_steps_are_counted_as_by_transformers():
    assert total_steps(33, 8, 3, 0) == 15
    assert total_steps(33, 8, 0.5, 0) == math.ceil(2.5)
    assert total_steps(1, 8, 3, 2) == 2


@given(st.lists(st.integers(1, 50), min_size=1, max_size=40), st.integers(1, 200))
def test_packing_keeps_every_row_once_and_under_the_bound(lengths, most):
    batches = pack(lengths, most)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        longest = max(lengths[i] for i in batch)
        assert len(batch) == 1 or len(batch) * longest <= most
