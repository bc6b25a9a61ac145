import dataclasses
import functools
import sys
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from veratune.errors import ConfigError, QueueFullError
from veratune.serving.engine.scheduler import Scheduler, SchedulerConfig, select_prefill_batch


@dataclasses.dataclass(eq=False)
class FakeRequest:
    tenant: str
    size: int = 1


def names(scheduler, count):
    return [getattr(scheduler.take(), "tenant", None) for _ in range(count)]


def test_tenants_take_turns_however_much_one_of_them_asks():
    scheduler = Scheduler(SchedulerConfig(max_num_seqs=100))
    for tenant in ("a", "a", "a", "a", "b", "c", "b"):
        scheduler.add(FakeRequest(tenant))
    assert names(scheduler, 8) == ["a", "b", "c", "a", "b", "a", "a", None]


def test_no_more_run_than_there_are_rows():
    scheduler = Scheduler(SchedulerConfig(max_num_seqs=2))
    asked = [FakeRequest("a") for _ in range(3)]
    for ask in asked:
        scheduler.add(ask)
    assert [scheduler.take(), scheduler.take(), scheduler.take()] == [asked[0], asked[1], None]
    scheduler.finish(asked[0])
    assert scheduler.take() is asked[2]
    assert (scheduler.running, scheduler.waiting) == (2, 0)


def test_news_are_not_missed():
    """What came between a look and the sleep ends the sleep."""
    scheduler = Scheduler(SchedulerConfig())
    scheduler.add(FakeRequest("a"))
    start = time.perf_counter()
    scheduler.wait(30)
    scheduler.wake()
    scheduler.wait(30)
    assert time.perf_counter() - start < 10


def test_what_is_too_much_is_refused_and_what_ended_counts_no_more():
    scheduler = Scheduler(
        SchedulerConfig(max_queue=3, max_queue_per_tenant=2, max_total_tokens=100)
    )
    first = FakeRequest("a", 40)
    scheduler.add(first)
    scheduler.add(FakeRequest("a", 10))
    with pytest.raises(QueueFullError, match="2 requests of this tenant are waiting"):
        scheduler.add(FakeRequest("a"))
    with pytest.raises(QueueFullError, match="50 tokens are being worked on"):
        scheduler.add(FakeRequest("b", 60))
    scheduler.add(FakeRequest("b", 50))
    with pytest.raises(QueueFullError, match="3 requests are waiting already"):
        scheduler.add(FakeRequest("c"))
    assert scheduler.withdraw(first)
    assert not scheduler.withdraw(first)
    scheduler.add(FakeRequest("c", 40))
    running = scheduler.take()
    assert not scheduler.withdraw(running)
    alone = Scheduler(SchedulerConfig(max_total_tokens=10))
    alone.add(FakeRequest("a", 50))  # larger than the bound, but nobody else is there
    with pytest.raises(ConfigError, match="max_num_seqs is 0"):
        SchedulerConfig(max_num_seqs=0)


@given(st.lists(st.tuples(st.sampled_from("abc"), st.booleans()), max_size=60))
def test_a_request_waits_for_at_most_one_of_each_other_tenant(steps):
    """Between two turns of a tenant that waits, nobody else has more than one."""
    scheduler = Scheduler(SchedulerConfig(max_num_seqs=1000, max_queue_per_tenant=1000))
    since = {tenant: {} for tenant in "abc"}
    queued = dict.fromkeys("abc", 0)
    for tenant, add in steps:
        if add:
            scheduler.add(FakeRequest(tenant))
            queued[tenant] += 1
            continue
        taken = scheduler.take()
        if taken is None:
            assert not any(queued.values())
            continue
        queued[taken.tenant] -= 1
        since[taken.tenant] = {}
        for other in "abc":
            if other != taken.tenant and queued[other]:
                since[other][taken.tenant] = since[other].get(taken.tenant, 0) + 1
                assert since[other][taken.tenant] <= 1 + (queued[other] == 0) + 1
            elif not queued[other]:
                since[other] = {}


@given(st.lists(st.integers(1, 300), min_size=1, max_size=40), st.integers(1, 300))
def test_texts_that_are_read_together_fill_their_pass(sizes, most):
    chosen = select_prefill_batch(sizes, most)
    assert chosen[0] == 0  # the first one is never left behind
    assert chosen == sorted(set(chosen))
    own = [sizes[i] for i in chosen]
    area = max(own) * len(own)
    assert len(own) == 1 or area <= most
    assert area - sum(own) <= max(0.25 * area, 32)  # little padding, or less than a pass costs


def test_what_waits_is_counted_while_tenants_come_and_go(request):
    request.addfinalizer(functools.partial(sys.setswitchinterval, sys.getswitchinterval()))
    sys.setswitchinterval(1e-6)  # threads take turns in the middle of everything
    scheduler = Scheduler(SchedulerConfig(max_num_seqs=1000, max_queue=1000))
    stop = threading.Event()

    def come_and_go():
        while not stop.is_set():
            asked = [FakeRequest(str(i)) for i in range(50)]
            for ask in asked:
                scheduler.add(ask)
            for ask in asked:
                scheduler.withdraw(ask)

    other = threading.Thread(target=come_and_go)
    other.start()
    try:
        assert all(0 <= scheduler.waiting <= 50 for _ in range(2000))
    finally:
        stop.set()
        other.join()
