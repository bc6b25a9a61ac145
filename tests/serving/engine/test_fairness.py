"""One tenant cannot hold every slot: others get their share at the next step."""

from tests.serving.fakes import QV, adapter, engine, generate_alone, small_llama
from veratune.serving.engine.requests import GenerationRequest
from veratune.serving.engine.sampling import SamplingParams
from veratune.serving.engine.scheduler import Scheduler, SchedulerConfig

LONG = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
SHORT = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)


def test_a_tenant_that_holds_every_slot_makes_room():
    """Paused sequences go on where they were, token for token."""
    own = adapter(small_llama, QV, 0)
    server = engine(rows=4, max_num_batched_tokens=64)
    many = [
        server.submit(GenerationRequest("a", [4 + i] * 5, LONG, key="own", load=lambda: own))
        for i in range(4)
    ]
    while server.scheduler.running < 4 or len(server.batch) < 4:
        server.step()
    for _ in range(5):
        server.step()
    others = [server.submit(GenerationRequest("b", [9, 9 + i], SHORT)) for i in range(3)]
    steps = 0
    while any(request.finished_time is None for request in others):
        server.step()
        steps += 1
        of_b = sum(request.tenant == "b" for request in server.batch.requests)
        assert of_b <= 2  # b has no more than its share either
    assert steps < 20
    assert server.stats.preemptions >= 2
    while server.scheduler.running or server.scheduler.waiting:
        server.step()
    for request in many:
        wanted = generate_alone(small_llama, request.tokens, own, 60)
        assert request.output_token_ids[: len(wanted)] == wanted
        assert len(request.output_token_ids) == 60
    for request in others:
        wanted = generate_alone(small_llama, request.tokens, None, 3)
        assert request.output_token_ids[: len(wanted)] == wanted
    assert server.pool.pinned == 0
    assert server.scheduler.tokens == 0
    assert server.runner.cache.lengths == [0] * 4


def test_a_paused_sequence_can_be_cancelled_and_closed():
    server = engine(rows=2)
    many = [server.submit(GenerationRequest("a", [4 + i], LONG)) for i in range(2)]
    server.step()
    server.submit(GenerationRequest("b", [9], LONG))
    server.step()
    (paused,) = [request for request in many if request not in server.batch]
    server.cancel(paused)
    server.step()
    assert paused.finished_time is not None
    server.submit(GenerationRequest("a", [7], LONG))
    server.submit(GenerationRequest("c", [7], LONG))
    server.step()
    server.close()
    assert (server.scheduler.running, server.scheduler.waiting, server.scheduler.tokens) == (
        0,
        0,
        0,
    )


class FakeRequest:
    def __init__(self, tenant):
        self.tenant, self.size = tenant, 1


def test_nobody_is_paused_without_need():
    scheduler = Scheduler(SchedulerConfig(max_num_seqs=4))
    running = [FakeRequest("a") for _ in range(3)]
    for request in running:
        scheduler.add(request)
        scheduler.take()
    scheduler.add(FakeRequest("b"))
    assert scheduler.victim(running) is None  # a slot is free
    scheduler.take()
    scheduler.add(FakeRequest("a"))
    assert scheduler.victim(running) is None  # a has more than its share, and waits
    scheduler.add(FakeRequest("b"))
    assert scheduler.victim(running) is running[-1]
    scheduler.preempt(running[-1])
    assert scheduler.take().tenant == "b"
    assert scheduler.victim(running[:2]) is None  # two each


def test_a_tenant_at_its_share_lets_others_go_first():
    scheduler = Scheduler(SchedulerConfig(max_num_seqs=4))
    for tenant in "aaab":
        scheduler.add(FakeRequest(tenant))
    assert [scheduler.take().tenant for _ in range(4)] == ["a", "b", "a", "a"]
