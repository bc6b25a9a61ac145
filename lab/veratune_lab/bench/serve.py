"""Serving under load: one engine with many tenants, beside one tenant, the base alone, one request after the other, and PEFT's mixed batches.

Two kinds of load. Closed: so many requests at once until all are answered, step by step in turns with the other workloads, for ratios. Open: requests come
at random times at a rate, whoever is ready or not, from tenants of whom few ask much and many little (Zipf), for times as users see them.
"""

import asyncio
import copy
import dataclasses
import gc
import importlib.util
import itertools
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from veratune.adapter import Adapter, extract
from veratune.analysis.machine import describe_machine
from veratune.attach import attach, detach
from veratune.config import VeraConfig
from veratune.errors import VeratuneError
from veratune.formats import native
from veratune.serving.engine.engine import Engine
from veratune.serving.engine.requests import GenerationRequest
from veratune.serving.engine.sampling import SamplingParams
from veratune.serving.engine.scheduler import SchedulerConfig
from veratune.serving.engine.threads import run_in_temporary_thread
from veratune.serving.pool.pool import AdapterPool
from veratune.serving.store.sqlite import SqliteStore
from veratune_lab.bench.load import Load, OpenLoad

Line = dict[str, Any]
Log = Callable[[str], Any]
_TURNS = 6  # of a conversation
_SAMPLE = 200  # files that stand for all, where thousands are loaded


@dataclasses.dataclass
class Answered:
    """One answer: seconds to its first token, and from each token to the next."""

    first: float
    gaps: list[float]


def _held(made: Sequence[Adapter], tenant: int | None) -> Callable[[], Adapter] | None:
    """How a tenant's adapter is loaded that is at hand."""
    return None if tenant is None else lambda: made[tenant]


def _stored(store: SqliteStore, number: int) -> Callable[[], Adapter]:
    """How an adapter is loaded from the store."""
    return lambda: native.decode(store.get("t", f"n{number}", 1))


Send = Callable[[int], Awaitable[Answered]]


def percentiles(values: Sequence[float], unit: float = 1e3) -> dict[str, float]:
    """p50, p90 and p99, in milliseconds."""
    return (
        {f"p{p}_ms": round(unit * float(np.percentile(values, p)), 2) for p in (50, 90, 99)}
        if values
        else {}
    )


async def open_loop(
    send: Send, load: OpenLoad, population: int, log: Log = print, seed: int = 0
) -> Line:
    """Times under requests that come at random: exponential gaps at `rate`, one of `population` tenants by Zipf's law. `send` answers one of a tenant's."""
    draw = np.random.default_rng(seed)
    shares = 1.0 / np.arange(1, population + 1) ** load.zipf
    tenants = draw.choice(population, load.requests, p=shares / shares.sum())
    starts = np.cumsum(draw.exponential(1 / load.rate, load.requests))
    answered: list[Answered] = []
    failed: list[str] = []
    begin = time.perf_counter()

    async def one(tenant: int, at: float) -> None:
        await asyncio.sleep(max(0.0, begin + at - time.perf_counter()))
        try:
            answered.append(await send(tenant))
        except (
            Exception
        ) as error:  # a request that is refused is a figure, not the end of the others
            failed.append(f"{type(error).__name__}: {error}")
        log(f"open load: {len(answered) + len(failed)} of {load.requests}")

    await asyncio.gather(
        *(one(int(tenant), at) for tenant, at in zip(tenants, starts, strict=True))
    )
    seconds = time.perf_counter() - begin
    tokens = sum(1 + len(a.gaps) for a in answered)
    return {
        "what": "open load", "rate": load.rate, "requests": load.requests, "population": population, "zipf": load.zipf,
        "distinct_tenants": len(set(tenants.tolist())), "failed": len(failed), "errors": sorted(set(failed))[:3], "tokens_per_second": round(tokens / seconds, 1),
        "first_token": percentiles([a.first for a in answered]), "each_token": percentiles([gap for a in answered for gap in a.gaps]),
    }  # fmt: skip


def measure(
    model: Any, tokenizer: Any, config: VeraConfig, load: Load, log: Log = print
) -> list[Line]:
    """All lines for one model."""
    log("adapters in memory")
    lines = [run_in_temporary_thread(lambda: _resident(model, config, load))]
    gc.collect()
    lines += run_in_temporary_thread(lambda: list(_closed(model, tokenizer, config, load, log)))
    lines.append(
        run_in_temporary_thread(lambda: _conversation(model, tokenizer, config, load, log))
    )
    lines += _cold(model, tokenizer, config, load, log)
    where = describe_machine() | {
        "rank": config.rank,
        "targets": list(config.targets or ()),
        "dtype": str(model.dtype).removeprefix("torch."),
    }
    where |= {
        "prompt": load.prompt,
        "answer": load.answer,
        "model": Path(model.config._name_or_path).name,
    }
    return [line | where for line in lines]


def _adapters(model: Any, config: VeraConfig, count: int) -> list[Adapter]:
    """Adapters as training makes them, with random b."""
    attach(model, config, "x")
    first = extract(model, "x")
    detach(model)
    made = []
    for number in range(count):
        generator = torch.Generator().manual_seed(number)
        b = {
            k: 0.05 * torch.randn(v.shape, generator=generator).to(v.dtype)
            for k, v in first.b.items()
        }
        made.append(dataclasses.replace(first, b=b))
    return made


def _prompts(model: Any, load: Load, count: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    size = model.config.get_text_config().vocab_size
    found: list[list[int]] = torch.randint(
        min(100, size // 2), size, (count, load.prompt), generator=generator
    ).tolist()
    return found


def _engine(
    model: Any, tokenizer: Any, pool: AdapterPool, load: Load, turns: int = 1, prefixes: int = 0
) -> Engine:
    limits = SchedulerConfig(
        max_num_seqs=load.rows,
        max_queue=100_000,
        max_queue_per_tenant=100_000,
        max_total_tokens=10**9,
    )
    engine = Engine(
        model,
        tokenizer,
        pool,
        config=limits,
        max_model_len=turns * (load.prompt + load.answer),
        prefix_cache_bytes=prefixes,
    )
    engine.eos_token_ids = set()  # equal work for all
    return engine


def _closed(model: Any, tokenizer: Any, config: VeraConfig, load: Load, log: Log) -> Iterator[Line]:
    """Tokens a second of each workload, and whether rows of a mixed batch are those of one tenant alone.

    All workloads go forward together, a step of the one that is furthest behind at a time: a machine that slows down slows all of them.
    """
    n = load.rows
    made, prompts = _adapters(model, config, n), _prompts(model, load, n)
    rival = _Peft(model, prompts, load)
    pool = AdapterPool(model, slots=2 * n)
    tenants: dict[str, tuple[list[int | None], int]] = {
        "base alone": ([None] * n, n), "one tenant": ([0] * n, n), f"{n} tenants": (list(range(n)), n),
        "one after the other": (list(range(min(n, 4))), 1),
    }  # fmt: skip
    speeds: dict[str, list[float]] = {}
    said: dict[str, list[list[int]]] = {}
    for turn in range(-1, load.rounds):  # the first turn warms up
        running: dict[str, Iterator[float]] = {}
        for name, (who, rows) in tenants.items():
            said[name] = [[] for _ in who]
            running[name] = _answer(
                _engine(model, tokenizer, pool, load), who, prompts, load, made, rows, said[name]
            )
        if rival.there:
            running[rival.name] = rival.answer()
        done, seconds = dict.fromkeys(running, 0.0), dict.fromkeys(running, 0.0)
        while running:
            name = min(running, key=done.__getitem__)
            begin = time.perf_counter()
            step = next(running[name], None)
            seconds[name] += time.perf_counter() - begin
            if step is None:
                del running[name]
            else:
                done[name] = step
            log(f"closed load, turn {turn + 1} of {load.rounds}: {min(done.values()):.0%}")
        for name, spent in seconds.items() if turn >= 0 else ():
            count = len(tenants[name][0]) if name in tenants else n
            speeds.setdefault(name, []).append(count * load.answer / spent)
    for name, values in speeds.items():
        ratios = [a / b for a, b in zip(values, speeds["one tenant"], strict=True)]
        yield {
            "what": "closed load", "workload": name, "tokens_per_second": round(statistics.median(values), 1),
            "of_one_tenant": round(statistics.median(ratios), 3), "turns": [round(v, 1) for v in values],
        }  # fmt: skip
    alone: list[list[int]] = [[] for _ in range(n)]
    for share in _answer(
        _engine(model, tokenizer, pool, load), list(range(n)), prompts, load, made, 1, alone
    ):
        log(f"each row alone: {share:.0%}")
    pool.close()
    yield {
        "what": "equal to alone",
        "rows": n,
        "equal": sum(a == b for a, b in zip(said[f"{n} tenants"], alone, strict=True)),
    }


def _answer(
    engine: Engine, tenants: Sequence[int | None], prompts: list[list[int]], load: Load, made: list[Adapter], rows: int,
    said: list[list[int]],
) -> Iterator[float]:  # fmt: skip
    """Answer all prompts, `rows` of them at once, a step at a time. Yields the share that is done; the tokens go to `said`."""
    waiting = []
    for tenant, prompt, tokens in zip(tenants, prompts, said, strict=False):
        request = GenerationRequest(
            f"t{tenant}",
            prompt,
            SamplingParams(temperature=0, max_tokens=load.answer),
            key=tenant,
            load=_held(made, tenant),
        )
        request.on_output = lambda piece, tokens=tokens: tokens.append(piece.token.token_id)  # type: ignore[misc]
        waiting.append(request)
    work = len(waiting) * load.answer
    while waiting or engine.scheduler.running or engine.scheduler.waiting:
        while waiting and engine.scheduler.running + engine.scheduler.waiting < rows:
            engine.submit(waiting.pop(0))
        engine.step()
        yield sum(map(len, said)) / work
    engine.close()


class _Peft:
    """PEFT's mixed batch of as many LoRAs, on a copy of the model: all rows begin and end together, which is the best case for it."""

    name = "PEFT LoRA r=16, mixed batch"

    def __init__(self, model: Any, prompts: list[list[int]], load: Load) -> None:
        self.prompts, self.load, self.there = (
            torch.tensor(prompts),
            load,
            importlib.util.find_spec("peft") is not None,
        )
        if not self.there:
            return
        import peft

        config = peft.LoraConfig(r=16, lora_alpha=16, target_modules=["q_proj", "v_proj"])
        self.names = [f"t{i}" for i in range(load.rows)]
        self.model = copy.deepcopy(model)
        self.lora = peft.tuners.lora.LoraModel(self.model, config, self.names[0])
        for name in self.names[1:]:
            self.lora.peft_config[name] = config
            self.lora.inject_adapter(self.model, name)
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(0, 0.02)
        self.lora.eval()

    def answer(self) -> Iterator[float]:
        """Answer all prompts, a step at a time. Yields the share that is done."""
        ids, cache = self.prompts, None
        for count in range(self.load.answer):
            with torch.no_grad(), self.lora._enable_peft_forward_hooks(adapter_names=self.names):
                out = self.model(
                    input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1
                )
            ids, cache = out.logits[:, -1:].argmax(-1), out.past_key_values
            yield (count + 1) / self.load.answer


def _resident(model: Any, config: VeraConfig, load: Load) -> Line:
    """Memory of many adapters in bfloat16, and the time from the store into a slot."""
    files = [native.encode(own) for own in _adapters(model, config, min(_SAMPLE, load.resident))]
    with tempfile.TemporaryDirectory() as folder:
        store = SqliteStore(Path(folder) / "adapters.db")
        for i, data in enumerate(files):
            store.put("t", f"n{i}", data)
        process = psutil.Process()
        gc.collect()
        before, times = process.memory_info().rss, []
        pool = AdapterPool(model, slots=load.resident, dtype=torch.bfloat16)
        pool.acquire("first", lambda: native.decode(files[0])).release()  # its kind, made once
        for i in range(load.resident - 1):
            begin = time.perf_counter()
            pool.acquire(i, _stored(store, i % len(files))).release()
            times.append(time.perf_counter() - begin)
        gc.collect()
        held = process.memory_info().rss - before
        count, size = len(pool), pool.bytes
        pool.close()
        store.close()
    return {
        "what": "adapters in memory", "adapters": count, "slot_bytes": size, "process_bytes": held, "file_bytes": len(files[0]), "load": percentiles(times),
    }  # fmt: skip


def _cold(model: Any, tokenizer: Any, config: VeraConfig, load: Load, log: Log) -> list[Line]:
    """Requests one after the other, by turns to an adapter in memory and to one in the store; then the open load, all from the store."""
    files = run_in_temporary_thread(
        lambda: [
            native.encode(own) for own in _adapters(model, config, min(_SAMPLE, load.population))
        ]
    )
    with tempfile.TemporaryDirectory() as folder:
        store = SqliteStore(Path(folder) / "adapters.db")
        for i in range(load.population):
            store.put("t", f"n{i}", files[i % len(files)])
        engine = run_in_temporary_thread(
            lambda: _engine(model, tokenizer, AdapterPool(model, slots=256), load)
        )
        prompts = _prompts(model, load, 64)
        engine.start()

        def asked(tenant: int, tokens: int) -> GenerationRequest:
            prompt = prompts[tenant % len(prompts)]
            return GenerationRequest(
                "t", prompt, SamplingParams(temperature=0, max_tokens=tokens), key=tenant, load=_stored(store, tenant)
            )  # fmt: skip

        first: dict[str, list[float]] = {"cold": [], "warm": []}
        wait: dict[str, list[float]] = {"cold": [], "warm": []}
        engine.submit(asked(0, 1)).result()
        for i in range(1, min(_SAMPLE, load.population)):
            for kind, tenant in (("cold", i), ("warm", 0)):
                request = engine.submit(asked(tenant, 1))
                request.result()
                assert request.first_token_time is not None
                assert request.adapter_ready_time is not None
                first[kind].append(request.first_token_time - request.arrival_time)
                wait[kind].append(request.adapter_ready_time - request.arrival_time)
        cold = {
            "what": "cold start", "first_token_cold": percentiles(first["cold"]), "first_token_warm": percentiles(first["warm"]),
            "adapter_cold": percentiles(wait["cold"]), "adapter_warm": percentiles(wait["warm"]),
        }  # fmt: skip

        async def send(tenant: int) -> Answered:
            running, done = asyncio.get_running_loop(), asyncio.Event()
            times: list[float] = []
            wrong: list[BaseException] = []

            def listen(piece: Any) -> None:
                if isinstance(piece, BaseException):
                    wrong.append(piece)
                elif piece.token is not None:
                    times.append(time.perf_counter())
                if wrong or piece.finish_reason is not None:
                    running.call_soon_threadsafe(done.set)

            request = asked(tenant, load.answer)
            request.on_output = listen
            engine.submit(request)
            await done.wait()
            if wrong:
                raise wrong[0]
            return Answered(
                times[0] - request.arrival_time, [b - a for a, b in itertools.pairwise(times)]
            )

        engine.pool.stats = type(engine.pool.stats)()
        line = asyncio.run(open_loop(send, load, load.population, log))
        counts = engine.pool.stats
        line |= {"hits": counts.hits, "loads": counts.loads}
        engine.close()
        engine.pool.close()
        store.close()
    return [cold, line]


def _conversation(model: Any, tokenizer: Any, config: VeraConfig, load: Load, log: Log) -> Line:
    """Time to the first token of each turn of a conversation, with what was read kept for the next turn and without, a turn of each by turns."""
    (own,), pool = _adapters(model, config, 1), AdapterPool(model, slots=2 * load.rows)
    engines = {
        "kept": _engine(model, tokenizer, pool, load, _TURNS, 2**30),
        "read_again": _engine(model, tokenizer, pool, load, _TURNS),
    }
    turns = min(_TURNS, engines["kept"].max_model_len // (load.prompt + load.answer))
    first: dict[str, list[list[float]]] = {name: [[] for _ in range(turns)] for name in engines}
    fresh, equal = _prompts(model, load, turns * (load.rounds + 1)), 0
    for number in range(-1, load.rounds):  # the first conversation warms up
        talk: list[int] = []
        for turn in range(turns):
            talk += fresh.pop()
            answers: list[list[int]] = []
            for name, engine in engines.items():
                asked = GenerationRequest(
                    "t",
                    tuple(talk),
                    SamplingParams(temperature=0, max_tokens=load.answer),
                    key=0,
                    load=lambda: own,
                )
                engine.submit(asked)
                while asked.finished_time is None:
                    engine.step()
                assert asked.first_token_time is not None
                answers.append(list(asked.output_token_ids))
                if number >= 0:
                    first[name][turn].append(asked.first_token_time - asked.arrival_time)
            equal += answers[0] == answers[1]
            talk += answers[0]
            log(f"conversation {number + 2} of {load.rounds + 1}: turn {turn + 1} of {turns}")
    for engine in engines.values():
        engine.close()
    pool.close()
    shown = {
        name: [round(1e3 * statistics.median(times), 1) for times in own]
        for name, own in first.items()
    }
    return {
        "what": "conversation", "turns": turns, "last_prompt": len(talk) - load.answer, "first_token_kept_ms": shown["kept"],
        "first_token_read_again_ms": shown["read_again"], "equal": equal, "answers": turns * (load.rounds + 1),
    }  # fmt: skip


async def against(url: str, key: str | None, load: OpenLoad, log: Log = print) -> Line:
    """The open load on a server with OpenAI's API: its models are the tenants. Raises VeratuneError where it has none."""
    import openai

    async with openai.AsyncOpenAI(
        base_url=f"{url.rstrip('/')}/v1", api_key=key or "none", max_retries=0, timeout=600
    ) as client:
        try:
            names = [model.id async for model in client.models.list()]
        except openai.OpenAIError as error:
            raise VeratuneError(f"{url}: its models cannot be listed: {error}") from None
        if not names:
            raise VeratuneError(f"{url}: it has no models")

        numbers = itertools.count()  # or a server would know the prompt from a request before

        async def send(tenant: int) -> Answered:
            begin, times = time.perf_counter(), []
            stream = await client.chat.completions.create(
                model=names[tenant],
                messages=[{"role": "user", "content": f"{next(numbers)} " + "word " * load.prompt}],
                max_tokens=load.answer,
                stream=True,
            )
            async for chunk in stream:
                if chunk.choices and chunk.choices[0].delta.content:
                    times.append(time.perf_counter())
            if not times:  # an answer may be empty
                times.append(time.perf_counter())
            return Answered(times[0] - begin, [b - a for a, b in itertools.pairwise(times)])

        return await open_loop(send, load, len(names), log) | {"url": url}
