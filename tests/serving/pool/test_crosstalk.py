"""The same prompts under many tenants, while adapters are updated, rolled back and deleted: no answer is ever another's."""

import contextlib
import random
import threading

import pytest

from tests import fakes
from tests.serving.fakes import QV, adapter, generate_alone, small_llama
from veratune.errors import AdapterNotFoundError
from veratune.formats import native
from veratune.serving.engine.engine import Engine
from veratune.serving.engine.requests import GenerationRequest
from veratune.serving.engine.sampling import SamplingParams
from veratune.serving.engine.scheduler import SchedulerConfig
from veratune.serving.keys import Caller
from veratune.serving.pool.pool import AdapterPool
from veratune.serving.service import Service
from veratune.serving.store.sqlite import SqliteStore

TENANTS, CONTENTS, TOKENS = 8, 3, 6
PROMPTS = [[5, 6, 7], [9], [5, 6, 7, 5, 6, 7, 5, 6, 7, 5]]


@pytest.mark.parametrize("count", [600, pytest.param(10_000, marks=pytest.mark.slow)])
def test_no_answer_is_anothers(tmp_path, count):
    """Each tenant has contents of its own: an answer is that of one of them, and never another tenant's or the base model's."""
    made = [adapter(small_llama, QV, i) for i in range(TENANTS * CONTENTS)]
    files = [native.encode(own) for own in made]
    says = {
        (i, p): tuple(generate_alone(small_llama, PROMPTS[p], own, TOKENS))
        for i, own in enumerate(made)
        for p in range(len(PROMPTS))
    }
    base = {
        p: tuple(generate_alone(small_llama, PROMPTS[p], None, TOKENS)) for p in range(len(PROMPTS))
    }
    whose = {}
    for (i, p), tokens in says.items():
        whose.setdefault((p, tokens), set()).add(i // CONTENTS)
    told_apart = sum(len(tenants) == 1 for tenants in whose.values())
    assert told_apart > 0.9 * len(says)  # or the test could not fail

    model = small_llama().eval()
    engine = Engine(
        model,
        fakes.tokenizer(),
        AdapterPool(model, slots=10),
        config=SchedulerConfig(max_num_seqs=10, max_queue=64),
        max_model_len=128,
        prefix_cache_bytes=100_000,
    )
    engine.eos_token_ids = set()
    service = Service(SqliteStore(tmp_path / "adapters.db"), engine, served_model_name="base")
    for tenant in range(TENANTS):
        service.put(f"t{tenant}", "mine", files[tenant * CONTENTS])
    engine.start()
    wrong, gone, done, stop = [], [0], [0], threading.Event()

    def change():
        rng = random.Random(0)
        while not stop.is_set():
            tenant, content, what = (
                rng.randrange(TENANTS - 1),
                rng.randrange(CONTENTS),
                rng.random(),
            )  # the last one is left alone
            if what < 0.6:
                service.put(f"t{tenant}", "mine", files[tenant * CONTENTS + content])
            elif what < 0.8:
                number = service.put(
                    f"t{tenant}", "mine", files[tenant * CONTENTS + content]
                ).number
                service.store.roll_back(f"t{tenant}", "mine", number)
            else:
                with contextlib.suppress(AdapterNotFoundError):
                    service.delete(f"t{tenant}", "mine")
            stop.wait(0.002)

    def ask(seed, times):
        rng = random.Random(seed)
        for _ in range(times):
            tenant, p = rng.randrange(TENANTS), rng.randrange(len(PROMPTS))
            bare = rng.random() < 0.1
            caller = Caller((f"t{tenant}",))
            try:
                asked = service.request_fields(caller, "base" if bare else "mine", engine)
                request = GenerationRequest(
                    **asked,
                    tokens=PROMPTS[p],
                    sampling=SamplingParams(temperature=0, max_tokens=TOKENS),
                )
                tokens = tuple(piece.token.token_id for piece in engine.submit(request))
            except AdapterNotFoundError:
                gone[0] += 1
                continue
            allowed = (
                {base[p]} if bare else {says[tenant * CONTENTS + c, p] for c in range(CONTENTS)}
            )
            if tenant == TENANTS - 1 and not bare:
                allowed = {says[tenant * CONTENTS, p]}
            if tokens not in allowed:
                wrong.append((tenant, p, bare, tokens))
            done[0] += 1

    changer = threading.Thread(target=change)
    askers = [threading.Thread(target=ask, args=(i, count // 20)) for i in range(20)]
    for thread in (changer, *askers):
        thread.start()
    for thread in askers:
        thread.join()
    stop.set()
    changer.join()
    service.close()
    service.store.close()
    assert wrong == []
    assert done[0] + gone[0] == count
    assert done[0] > 0.5 * count
    assert gone[0] > 0  # some were deleted just then
    assert engine.pool.stats.evictions > 10
    assert engine.stats.cached_tokens > 100
    assert engine.pool.pinned == 0
