"""Write docs/benchmarks.md and its picture from benchmarks/results: python docs/make_benchmarks.py (a test compares the page).

The lines come from `make benchmarks`, and from the two scripts that the page names.
"""

import json
import statistics
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULTS = HERE.parent / "benchmarks" / "results"
OTHERS = ("monarch_against_random", "plans_agree", "serving", "store", "layers_blocks", "servers")
PAGE, PICTURE = HERE / "benchmarks.md", HERE / "benchmarks.png"

Line = Mapping[str, Any]
MODELS = {
    "roberta-base": "RoBERTa-base, query and value, 16 x 128 tokens",
    "vit-base": "ViT-B/16, query and value, 16 x 197 tokens",
    "llama-1024": "Llama, 1024 wide, all linear layers, 4 x 512 tokens",
    "smollm2-135m": "SmolLM2-135M, all linear layers, 4 x 512 tokens",
}
TASKS = {
    "sst2": ("SST-2, MiniLM", "accuracy", 100, "higher"),
    "e2e": ("E2E NLG, SmolLM2-135M", "held-out loss", 1, "lower"),
    "alpaca": ("Alpaca, SmolLM2-135M", "held-out loss", 1, "lower"),
}


def read(name: str) -> list[Line]:
    """The lines of one file of results."""
    return [json.loads(line) for line in (RESULTS / f"{name}.jsonl").read_text().splitlines()]


def method(line: Line) -> str:
    """A contestant's name."""
    names = {
        "frozen": "frozen",
        "full": "full fine-tuning",
        "lora": "PEFT LoRA",
        "peft-vera": "PEFT VeRA",
        "veratune": "veratune",
    }
    words = [names[line["method"]], f"r={line['rank']}" if line["rank"] else ""]
    return " ".join(w for w in [*words, line.get("basis", "random").replace("random", "")] if w)


def rows_of_models(steps: list[Line]) -> Iterable[list[Line]]:
    """The lines of each run of `python -m veratune_lab bench step`, in the order in which they were measured."""
    run: list[Line] = []
    for line in steps:
        if line["method"] == "frozen" and run:
            yield run
            run = []
        run.append(line)
    yield run


def page(
    layers: list[Line],
    steps: list[Line],
    monarch: list[Line],
    agree: list[Line],
    served: list[Line],
    stores: list[Line],
    blocks: list[Line],
    servers: list[Line],
) -> str:
    """The page as text."""
    first = steps[0]
    out = [
        "# Benchmarks", "",
        "Made from `benchmarks/results/` by `make docs`; measured by `make benchmarks`.", "",
        f"Machine: {first['machine']}, {first['threads']} threads of {first['cores']} cores, fp32; torch {first['torch']}, peft "
        f"{first['peft']}, transformers {first['transformers']}. All contestants take turns in one process; a ratio is the median over the turns of "
        "a contestant's time over the frozen model's in the same turn. The frozen model computes its output and the gradient to "
        "its input: the least that any training of something inside it can cost. All take the same inputs; forward and backward are "
        "timed, without an optimizer. FLOPs are counted by torch's `FlopCounterMode`; bytes are those that autograd keeps for the "
        "backward, weights and the frozen basis apart. Where a table names a clock, one thread ran on a busy machine and its CPU time "
        "was counted.", "",
        "![Time over the frozen model, and speed over PEFT's VeRA by size of layer](benchmarks.png)", "",
        "## Whole models", "",
    ]  # fmt: skip
    for run in rows_of_models(steps):
        peft = next(line for line in run if line["method"] == "peft-vera")
        out += [
            f"### {MODELS[run[0]['model']]}, rank {peft['rank']}, {run[0]['layers']} layers", "",
            *conditions(run[0]),
            "| | seconds (quartiles) | over frozen | FLOPs beyond frozen, of PEFT VeRA's | kept for backward | of PEFT VeRA's | peak | trained |",
            "|---|---|---|---|---|---|---|---|",
        ]  # fmt: skip
        for line in run:
            beyond = line["flops_beyond_frozen"] / peft["flops_beyond_frozen"]
            out.append(
                f"| {method(line)} | {line['seconds']:.2f} ({line['lower_quartile']:.2f} to {line['upper_quartile']:.2f}) | "
                f"{line['over_frozen']:.2f} | {beyond:.2f} | {line['saved_bytes'] / 2**20:,.0f} MiB | "
                f"{line['saved_bytes'] / peft['saved_bytes']:.2f} | {line['peak_bytes'] / 2**20:,.0f} MiB | {line['trained']:,} |"
            )
        out.append("")
    out += [
        "## One linear layer", "",
        "Time over the frozen layer, forward and backward, in every size of the grid. In brackets the plan that veratune took.", "",
        "| T, n -> m | r | PEFT VeRA | veratune | speed over PEFT VeRA | LoRA r=8 | LoRA r=64 | full |", "|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for ours, peft, others in cells(layers):
        out.append(
            f"| {ours['T']}, {ours['n']} -> {ours['m']} | {ours['rank']} | {peft['over_frozen']:.2f} | "
            f"{ours['over_frozen']:.2f} ({ours['chosen']}) | {peft['seconds'] / ours['seconds']:.2f} | "
            + " | ".join(f"{line['over_frozen']:.2f}" for line in others)
            + " |"
        )
    slowest = min(peft["seconds"] / ours["seconds"] for ours, peft, _ in cells(layers))
    out += ["", f"The least speed over PEFT's VeRA in any cell is {slowest:.2f}.", ""]
    out += [
        "## The plans give the same training", "",
        f"MiniLM on MRPC, {agree[0]['steps']} steps of {agree[0]['batch']} pairs, rank {agree[0]['rank']}, learning rate "
        f"{agree[0]['lr']:g} (`benchmarks/bench_plans_agree.py`): the largest distance of any step's loss from the factored order in float64.", "",
        "| plan | largest distance | mean loss of the last 20 steps |", "|---|---|---|",
        *(f"| {a['plan']} | {a['largest_distance']:.1e} | {a['last_losses_mean']:.5f} |" for a in agree),
        f"| factored, float64 | | {agree[0]['float64_last_losses_mean']:.5f} |", "",
        "## A basis of blocks", "",
        '`basis="monarch"` makes A and B of small blocks (see [concepts](concepts.md)). Three real tasks, three seeds, every learning '
        "rate tried on seed 0 for each basis and the best one kept (`benchmarks/bench_monarch_against_random.py`); rank as wide as the model, "
        "query and value.", "",
        "| task | score | better | untrained | full matrices | blocks | learning rates |", "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for task, (name, score, factor, better) in TASKS.items():
        found = {
            basis: best_runs(
                [line for line in monarch if line["task"] == task and line["basis"] == basis]
            )
            for basis in ("random", "monarch")
        }
        if not all(found.values()):
            continue
        scores = (
            spread([factor * line["after"] for line in found[basis]], 1 if factor == 100 else 3)
            for basis in ("random", "monarch")
        )
        rates = ", ".join(f"{found[basis][0]['lr']:g}" for basis in ("random", "monarch"))
        before = factor * found["random"][0]["before"]
        out.append(
            f"| {name} | {score} | {better} | {before:.{1 if factor == 100 else 3}f} | {' | '.join(scores)} | {rates} |"
        )
    out += ["", *one_layer_of_blocks(blocks), *serving(served), *peers(servers), *storing(stores)]
    return "\n".join(out) + "\n"


def conditions(line: Line) -> list[str]:
    """The clock of a run and what ran beside it; nothing for wall time on a quiet machine."""
    if "clock" not in line:
        return []
    turns = (
        f", {line['turns']} turns of {line['processes']} processes" if "processes" in line else ""
    )
    return [f"{line['threads']} thread, {line['clock']}, beside {line['beside']}{turns}.", ""]


def one_layer_of_blocks(lines: list[Line]) -> list[str]:
    """The block basis in every size of the grid, beside LoRA at rank 8."""
    by = {(x["T"], x["n"], x["m"], x["method"], x["rank"]): x for x in lines}
    ranks = sorted({x["rank"] for x in lines if x["method"] == "veratune"})
    sizes = list(dict.fromkeys((x["T"], x["n"], x["m"]) for x in lines))
    out = [
        "Time over the frozen layer, forward and backward; in brackets the plan that was taken.", "",
        *conditions(lines[0]),
        "| T, n -> m | LoRA r=8 | " + " | ".join(f"blocks r={r}" for r in ranks) + " |",
        "|---|---|" + "---|" * len(ranks),
    ]  # fmt: skip
    below = 0
    for T, n, m in sizes:
        lora = by[T, n, m, "lora", 8]["over_frozen"]
        ours = [by[T, n, m, "veratune", r] for r in ranks]
        below += sum(line["over_frozen"] <= lora for line in ours)
        shown = " | ".join(f"{line['over_frozen']:.2f} ({line['chosen']})" for line in ours)
        out.append(f"| {T}, {n} -> {m} | {lora:.2f} | {shown} |")
    total = len(sizes) * len(ranks)
    return [*out, "", f"Blocks take at most LoRA's time in {below} of {total} cells.", ""]


def serving(lines: list[Line]) -> list[str]:
    """Serving under load, one column for each precision."""
    kinds = list(dict.fromkeys(line["dtype"] for line in lines))
    first = lines[0]
    by = {(line["dtype"], line["what"], line.get("workload", "")): line for line in lines}
    out = [
        "## Serving", "",
        f"`python -m veratune_lab bench serve` on {first['model']}: adapters of query and value at rank {first['rank']}, prompts of {first['prompt']} tokens, answers of "
        f"{first['answer']}, greedy. The closed loads go forward together, a step of the one that is furthest behind at a time; 32 rows at once, or one. PEFT's batch is static: "
        "all rows begin and end together, nothing is read while others answer.", "",
        "| | " + " | ".join(kinds) + " |", "|---|" + "---|" * len(kinds),
    ]  # fmt: skip

    def row(title: str, shown: Callable[[str], str]) -> None:
        out.append(f"| {title} | " + " | ".join(shown(kind) for kind in kinds) + " |")

    for workload in (
        line["workload"]
        for line in lines
        if line["what"] == "closed load" and line["dtype"] == kinds[0]
    ):

        def speed(kind: str, workload: str = workload) -> str:
            line = by[kind, "closed load", workload]
            return f"{line['tokens_per_second']:.0f} tokens/s, {line['of_one_tenant']:.2f} of one tenant's"

        row(workload, speed)

    def p(figures: Mapping[str, float]) -> str:
        return f"{figures['p50_ms']:,.1f} / {figures['p99_ms']:,.1f} ms"

    def times(what: str, name: str) -> Callable[[str], str]:
        return lambda kind: p(by[kind, what, ""][name])

    row(
        "rows of the mixed batch equal to alone",
        lambda kind: "{equal} of {rows}".format(**by[kind, "equal to alone", ""]),
    )
    held = "adapters in memory"
    row(
        f"{by[kinds[0], held, '']['adapters']:,} adapters in bfloat16",
        lambda kind: f"{by[kind, held, '']['process_bytes'] / 2**20:,.0f} MiB of the process",
    )
    row("store into a slot, p50 / p99", times(held, "load"))
    talk = by[kinds[0], "conversation", ""]
    row(
        f"first token of turn {talk['turns']} of a conversation, {talk['last_prompt']} tokens: what was read is kept / is read again",
        lambda kind: "{} / {}".format(
            *(
                f"{by[kind, 'conversation', ''][f'first_token_{how}_ms'][-1]:,.0f} ms"
                for how in ("kept", "read_again")
            )
        ),
    )
    row(
        "  answers equal with and without",
        lambda kind: "{equal} of {answers}".format(**by[kind, "conversation", ""]),
    )
    row("first token, adapter in memory, p50 / p99", times("cold start", "first_token_warm"))
    row("first token, adapter in the store", times("cold start", "first_token_cold"))
    row("  until it has its adapter, in memory", times("cold start", "adapter_warm"))
    row("  until it has its adapter, in the store", times("cold start", "adapter_cold"))
    row(
        "open load: requests a second, tenants asked",
        lambda kind: "{rate:g}, {distinct_tenants} of {population}".format(
            **by[kind, "open load", ""]
        ),
    )
    row("  first token, p50 / p99", times("open load", "first_token"))
    row("  each token, p50 / p99", times("open load", "each_token"))
    return [*out, ""]


def peers(lines: list[Line]) -> list[str]:
    """Servers on the same base model: tokens a second and time to first token, by clients."""
    clients = sorted({line["clients"] for line in lines})
    first = lines[0]
    cells: dict[tuple[str, str], dict[int, list[Line]]] = {}
    for line in lines:
        cells.setdefault((line["dtype"], line["server"]), {}).setdefault(
            line["clients"], []
        ).append(line)

    def cell(found: list[Line] | None) -> str:
        if not found or any("tokens_per_second" not in line for line in found):
            return "-"
        speeds = [line["tokens_per_second"] for line in found]
        p50, p99 = (
            statistics.median(line[f"first_token_{p}_ms"] for line in found) for p in ("p50", "p99")
        )
        around = f" ({min(speeds):.0f} to {max(speeds):.0f})" if len(speeds) > 1 else ""
        return f"{statistics.median(speeds):.0f}{around}; {p50:,.0f} / {p99:,.0f}"

    rounds = max(len(found) for own in cells.values() for found in own.values())
    return [
        "### Beside other servers", "",
        f"{first['model']}, base model alone, streamed answers of {first['answer_tokens']} tokens to Alpaca instructions, {first['threads']} threads "
        f"(`benchmarks/bench_servers.py`). Each cell: tokens a second; time to first token, p50 / p99 in milliseconds. Medians of up to {rounds} interleaved round{'s' if rounds > 1 else ''}, with the range of the speeds.", "",
        "| dtype | server | " + " | ".join(f"{n} client{'s' if n > 1 else ''}" for n in clients) + " |",
        "|---|---|" + "---|" * len(clients),
        *(
            f"| {dtype} | {server} | " + " | ".join(cell(own.get(n)) for n in clients) + " |"
            for (dtype, server), own in cells.items()
        ),
        "",
    ]  # fmt: skip


def storing(lines: list[Line]) -> list[str]:
    """A SQLite store of many adapters."""
    out = [
        "## Storing", "",
        f"A SQLite store of adapters of {lines[0]['bytes_each']:,} bytes, 1,000 tenants (`benchmarks/bench_store.py`); p50 / p99 in milliseconds. A put is on disk when it is acknowledged.", "",
        "| adapters | file | put | newest version | read | page of a tenant's names |", "|---|---|---|---|---|---|",
    ]  # fmt: skip
    for line in lines:
        cells = " | ".join(
            f"{line[name]['p50_ms']:.2f} / {line[name]['p99_ms']:.2f}"
            for name in ("put", "newest", "get", "names")
        )
        out.append(f"| {line['adapters']:,} | {line['file_bytes'] / 1e9:.2f} GB | {cells} |")
    large = lines[-1]
    out += [
        "", f"A million adapters would be a file of {10 * large['file_bytes'] / 1e9:.0f} GB. Asking for the newest version walks a tree of some 100 MB, a level deeper at the most, "
        "which stays in memory: no slower to speak of. A read is one lookup and one file's pages; once the file is larger than memory most reads of rarely asked adapters go to the disk, so the p99 above "
        "becomes the typical time of a cold one. A put appends to the log and is as long as one sync of the disk, whatever the size. This was not measured.",
    ]  # fmt: skip
    return out


def cells(layers: list[Line]) -> Iterable[tuple[Line, Line, list[Line]]]:
    """(veratune, PEFT VeRA, [LoRA r=8, LoRA r=64, full]) of every size and rank."""
    by = {
        (x["T"], x["n"], x["m"], x["method"], x["rank"]): x for x in layers if x["plan"] == "auto"
    }
    for (T, n, m, kind, rank), line in by.items():
        if kind == "veratune":
            yield (
                line,
                by[T, n, m, "peft-vera", rank],
                [by[T, n, m, k, r] for k, r in (("lora", 8), ("lora", 64), ("full", 0))],
            )


def best_runs(lines: list[Line]) -> list[Line]:
    """The runs at the learning rate that was kept: the one with several seeds."""
    seeds = {
        rate: {x["seed"] for x in lines if x["lr"] == rate} for rate in {x["lr"] for x in lines}
    }
    return [x for x in lines if x["lr"] == max(seeds, key=lambda rate: len(seeds[rate]))]


def spread(values: list[float], digits: int) -> str:
    """Mean and standard deviation."""
    return f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"


def draw(layers: list[Line], steps: list[Line]) -> None:
    """The picture: whole models on the left, the grid on the right."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(
        1, 2, figsize=(15, 6), layout="constrained", width_ratios=(1, 1.1)
    )
    colours = {
        "lora": "#8fb3d9",
        "peft-vera": "#d98880",
        "veratune": "#2e7d4f",
        "monarch": "#7cc49a",
        "full": "#c9c9c9",
    }
    ticks, names, at, named = [], [], 0.0, set()
    for run in rows_of_models(steps):
        bars = [
            x
            for x in run
            if x["method"] != "frozen" and not (x["method"] == "lora" and x["rank"] == 64)
        ]
        start = at
        for line in bars:
            kind = "monarch" if line.get("basis") == "monarch" else line["method"]
            label = {
                "lora": "PEFT LoRA r=8",
                "peft-vera": "PEFT VeRA",
                "veratune": "veratune",
                "monarch": "veratune, blocks",
                "full": "full",
            }[kind]
            left.bar(
                at,
                line["over_frozen"] - 1,
                0.9,
                bottom=1,
                color=colours[kind],
                label=None if kind in named else label,
            )
            left.text(
                at,
                line["over_frozen"] + 0.01,
                f"{line['over_frozen']:.2f}",
                ha="center",
                fontsize=8,
            )
            named.add(kind)
            at += 1
        rank = next(x["rank"] for x in run if x["method"] == "peft-vera")
        ticks.append((start + at - 1) / 2)
        names.append(f"{run[0]['model']}\nr={rank}")
        at += 1
    left.axhline(1, color="black", linewidth=1)
    left.set_xticks(ticks, names, fontsize=8)
    left.set_ylabel("time of a training step over the frozen model's")
    left.legend(fontsize=8)
    left.set_title("Whole models")
    found = list(cells(layers))
    columns = sorted({(o["T"], o["rank"]) for o, _, _ in found})
    sizes = sorted({(o["n"], o["m"]) for o, _, _ in found})
    values = {(o["n"], o["m"], o["T"], o["rank"]): p["seconds"] / o["seconds"] for o, p, _ in found}
    grid = [[values[(*size, *column)] for column in columns] for size in sizes]
    image = right.imshow(grid, cmap="RdYlGn", vmin=0, vmax=2, aspect="auto")
    for i, row in enumerate(grid):
        for j, value in enumerate(row):
            right.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=8)
    right.set_xticks(range(len(columns)), [f"T={T}\nr={r}" for T, r in columns], fontsize=7)
    right.set_yticks(range(len(sizes)), [f"{n} -> {m}" for n, m in sizes])
    right.set_title("One layer: speed over PEFT's VeRA")
    figure.colorbar(image, ax=right, shrink=0.7)
    figure.savefig(PICTURE, dpi=110)


def main() -> None:
    layers, steps = read("layers"), read("steps")
    PAGE.write_text(page(layers, steps, *map(read, OTHERS)))
    draw(layers, steps)


if __name__ == "__main__":
    main()
