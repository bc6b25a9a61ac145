"""Many tenants on one engine: throughput beside one tenant, the base alone and one request after the other; memory and loading.

    python benchmarks/bench_serving.py --language FOLDER [--tenants 32] [--resident 10000]

FOLDER is SmolLM2-135M (`make demo` unpacks it to out/demo/smollm2). Every workload answers the same prompts greedily, in turns with the others; ratios are of
medians. Adapters are query and value at rank 256 with random vectors. Writes results/serving.jsonl.
"""

import argparse
import json
import resource
import statistics
import tempfile
import time
from pathlib import Path

import torch

HERE = Path(__file__).parent
LINES = HERE / "results" / "serving.jsonl"
PROMPT, ANSWER, ROUNDS = 32, 32, 3


def adapter(model, number):
    """Vectors by number, on the model's own layers."""
    import dataclasses

    import veratune as vt

    if "first" not in adapter.__dict__:
        vt.attach(model, vt.VeraConfig(rank=256, targets=("query", "value")), "x")
        adapter.first = vt.extract(model, "x")
        vt.detach(model)
    first, generator = adapter.first, torch.Generator().manual_seed(number)
    b = {k: 0.05 * torch.randn(v.shape, generator=generator) for k, v in first.b.items()}
    return dataclasses.replace(first, b=b)


def answer(engine, tenants, prompts, load, rows):
    """Seconds and tokens of all prompts, prompt i by tenant tenants[i]; rows of them at once."""
    from veratune.serving.engine import Request
    from veratune.serving.sampling import Sampling

    engine.ends = set()  # equal work for all
    requests = [
        Request(
            f"t{tenant}", prompt, Sampling(temperature=0, max_tokens=ANSWER), key=None if tenant is None else ("t", tenant), load=lambda t=tenant: load(t)
        )
        for tenant, prompt in zip(tenants, prompts, strict=True)
    ]  # fmt: skip
    found = [[] for _ in requests]
    for request, pieces in zip(requests, found, strict=True):
        request.listen = pieces.append
    begin, waiting = time.perf_counter(), list(requests)
    while waiting or engine.scheduler.running or engine.scheduler.waiting:
        while waiting and engine.scheduler.running + engine.scheduler.waiting < rows:
            engine.submit(waiting.pop(0))
        engine.step()
    seconds = time.perf_counter() - begin
    tokens = [[piece.choice.token for piece in pieces] for pieces in found]
    first = [request.first - request.arrived for request in requests]
    return {"seconds": seconds, "tokens": tokens, "first": first}


def main():
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--language", required=True)
    words.add_argument("--tenants", type=int, default=32)
    words.add_argument("--resident", type=int, default=10_000)
    words.add_argument("--threads", type=int, default=2)
    flags = words.parse_args()
    torch.set_num_threads(flags.threads)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from veratune.formats import native
    from veratune.serving.bank import Bank
    from veratune.serving.engine import Engine
    from veratune.serving.scheduler import Limits
    from veratune.serving.store import SqliteStore

    model = AutoModelForCausalLM.from_pretrained(flags.language, dtype=torch.float32).requires_grad_(False).eval()
    tokenizer = AutoTokenizer.from_pretrained(flags.language)
    count = flags.tenants
    adapters = [adapter(model, i) for i in range(count)]
    engine = Engine(
        model,
        tokenizer,
        Bank(model, slots=2 * count),
        limits=Limits(rows=count, waiting=10_000, waiting_tenant=10_000),
        length=256,
    )
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(100, 40_000, (count, PROMPT), generator=generator).tolist()
    loads = {
        "base": ([None] * count, count), "one tenant": ([0] * count, count), f"{count} tenants": (list(range(count)), count),
        "one after the other": ([0, 1, 2, 3], 1),
    }  # fmt: skip
    speeds, said = {name: [] for name in loads}, {}
    answer(engine, [None, 0], prompts[:2], adapters.__getitem__, 2)  # warm
    for _ in range(ROUNDS):
        for name, (tenants, rows) in loads.items():
            found = answer(engine, tenants, prompts[: len(tenants)], adapters.__getitem__, rows)
            speeds[name].append(sum(map(len, found["tokens"])) / found["seconds"])
            said[name] = found["tokens"]
            print(name, f"{speeds[name][-1]:.1f} tokens/s", flush=True)
    many, alone = said[f"{count} tenants"], said["one after the other"]
    equal = sum(a == b for a, b in zip(many[:4], alone, strict=True))
    lines = [
        {"what": name, "tokens_per_second": statistics.median(values), "rounds": values} for name, values in speeds.items()
    ]
    lines.append({"what": "equal to alone", "rows": len(alone), "equal": equal})
    engine.bank.close()

    with tempfile.TemporaryDirectory() as folder:
        store = SqliteStore(Path(folder) / "adapters.db")
        sample = 200
        for i in range(sample):
            store.put("t", f"n{i}", native.encode(adapters[i % count]))
        bank = Bank(model, slots=flags.resident, dtype=torch.bfloat16)
        before, times = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, []
        for i in range(flags.resident):
            begin = time.perf_counter()
            name = f"n{i % sample}"
            bank.acquire(i, lambda name=name: native.decode(store.get("t", name, 1))).release()
            times.append(time.perf_counter() - begin)
        held = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
        store.close()
    times.sort()
    lines.append({
        "what": "resident", "adapters": len(bank), "slot_bytes": bank.bytes, "process_bytes": held, "load_p50_ms": 1e3 * times[len(times) // 2],
        "load_p99_ms": 1e3 * times[len(times) * 99 // 100],
    })  # fmt: skip
    where = {"model": "SmolLM2-135M", "prompt": PROMPT, "answer": ANSWER, "threads": flags.threads, "torch": torch.__version__}
    LINES.write_text("".join(json.dumps({**line, **where}) + "\n" for line in lines))
    for line in lines:
        print(json.dumps(line))


if __name__ == "__main__":
    main()
