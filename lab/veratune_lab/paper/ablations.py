"""The ablations on GLUE: tables 6 and 7, and figures 2 to 5."""

import functools
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor

from veratune.adapter import Adapter
from veratune.analysis.inspect import figures
from veratune.basis.basis import new_basis
from veratune.config import VeraConfig
from veratune.formats import native
from veratune.ops.delta import delta_weight
from veratune_lab.paper.experiment import Cell, Line, Place, Scale, measured_on, spread, table
from veratune_lab.paper.glue import GLUE, LARGE, GlueTable, Trial, paper_trial, score_of

QV = ("query", "value")
RATES = {"lr": 3e-2, "head_lr": 5e-3}  # of the scaled VeRA runs
HEADS = {"stsb": 2e-2}  # tasks whose head wants another
LORA_RATES = {"lr": 2e-3, "head_lr": 5e-3}
SMALL = (
    "sst2",
    "stsb",
)  # tasks of the scaled runs: on so few rows MiniLM stays near chance on MRPC and RTE


class _Ablation(GlueTable):
    """Variants of VeRA on some tasks, all else equal; mean and standard deviation over seeds."""

    seeds = {"quick": 1, "scaled": 2, "full": 5}
    variants: ClassVar[Mapping[str, Mapping[str, Any]]]
    printed: ClassVar[Mapping[str, str]]
    tasks: ClassVar[Mapping[Scale, tuple[str, ...]]] = {
        "quick": ("sst2",),
        "scaled": SMALL,
        "full": ("mrpc", "rte"),
    }

    def cells(self, scale: Scale) -> list[Cell]:
        cells = []
        for variant, changes in self.variants.items():
            for task in self.tasks[scale]:
                if scale == "full":
                    cells.append(
                        self.cell(
                            scale, task, variant, paper_trial(task, LARGE, "VeRA", **changes), LARGE
                        )
                    )
                else:
                    vera = VeraConfig(**{"rank": 192, "targets": QV, **changes})
                    rates = {**RATES, "head_lr": HEADS.get(task, RATES["head_lr"])}
                    cells.append(self.cell(scale, task, variant, Trial(settings=rates, vera=vera)))
        return cells

    def page(self, lines: Sequence[Line], scale: Scale) -> str:
        tasks = self.tasks[scale]
        rows = []
        for variant in self.variants:
            of = [
                [line for line in lines if (line["method"], line["task"]) == (variant, task)]
                for task in tasks
            ]
            rows.append([variant, self.printed[variant], *(spread(own, score_of) for own in of)])
        return "\n".join([
            f"# {self.name}: {self.about}", "",
            table(["variant", "printed", *(f"{GLUE[task].title}, measured" for task in tasks)], rows),
            "Mean ± standard deviation over the seeds. Scaled: MiniLM, rank 192, as table2's scaled runs, learning rates 3e-2 and, for the head, 5e-3 (STS-B 2e-2) for all; "
            "the prints are RoBERTa-large's. A variant may want other rates than the default's, as in the paper.", "", measured_on(lines), "",
        ])  # fmt: skip


class Table6(_Ablation):
    name = "table6"
    about = "only d, only b; the distribution of A and B; where d starts (VeRA, table 6)"
    variants = {
        "default": {}, "only d": {"vectors": "d"}, "only b": {"vectors": "b"}, "Kaiming normal": {"init": "kaiming_normal"},
        "uniform [0, 0.1]": {"init": "uniform"}, "d from 1e-7": {"d_init": 1e-7}, "d from 1.0": {"d_init": 1.0},
    }  # fmt: skip
    printed = {
        "default": "MRPC 90.5 ± 0.7, RTE 85.8 ± 0.7", "only d": "89.7 ± 0.0, 67.0 ± 13.9", "only b": "81.6 ± 10.1, 64.3 ± 11.5",
        "Kaiming normal": "90.0 ± 1.1, 82.6 ± 5.2", "uniform [0, 0.1]": "68.9 ± 1.3, 53.1 ± 0.8", "d from 1e-7": "90.8 ± 0.9, 84.7 ± 0.9",
        "d from 1.0": "70.3 ± 1.2, 60.3 ± 12.4",
    }  # fmt: skip


class Table7(_Ablation):
    name = "table7"
    about = "one pair of matrices for all layers, or one for each (VeRA, table 7)"
    tasks = {"quick": ("sst2",), "scaled": SMALL, "full": ("mrpc", "rte", "cola", "stsb")}
    variants = {"shared": {}, "unique": {"sharing": "unique"}}
    printed = {
        "shared": "MRPC 90.0 ± 0.9, RTE 84.6 ± 1.5, CoLA 67.7 ± 0.8, STS-B 91.5 ± 0.6",
        "unique": "90.7 ± 0.3, 84.6 ± 0.8, 68.3 ± 1.8, 91.5 ± 0.2",
    }


def _lora(rank: int, rates: Mapping[str, float] = LORA_RATES) -> dict[str, Any]:
    return {"method": "peft:lora", "options": {"r": rank, "lora_alpha": rank}, **rates}


def _vera_trial(scale: Scale, rank: int, paper_rank: int | None = None) -> Trial:
    """VeRA on the figures' task. paper_rank: of the paper's run; default its own."""
    if scale == "full":
        return paper_trial(
            _task(scale), LARGE, "VeRA", **({} if paper_rank is None else {"rank": paper_rank})
        )
    return Trial(settings=RATES, vera=VeraConfig(rank=rank, targets=QV))


def _lora_trial(scale: Scale, rank: int) -> Trial:
    """LoRA on the figures' task."""
    if scale == "full":
        trial = paper_trial(_task(scale), LARGE, "LoRA")
        return Trial(
            settings={**trial.settings, "options": {"r": rank, "lora_alpha": 2 * rank}},
            vera=trial.vera,
        )
    return Trial(settings=_lora(rank), vera=VeraConfig(targets=QV))


def _task(scale: Scale) -> str:
    return "rte" if scale == "full" else "sst2"


def _model(scale: Scale) -> str:
    return LARGE if scale == "full" else ""


class Figure2(GlueTable):
    name = "figure2"
    about = (
        "score against the number of trained values, VeRA and LoRA of many ranks (VeRA, figure 2)"
    )
    seeds = {"quick": 1, "scaled": 1, "full": 5}
    vera_ranks: ClassVar[Mapping[Scale, tuple[int, ...]]] = {
        "quick": (1, 256),
        "scaled": (1, 4, 16, 64, 256, 1024),
        "full": (1, 4, 16, 64, 256, 1024),
    }
    lora_ranks: ClassVar[Mapping[Scale, tuple[int, ...]]] = {
        "quick": (1,),
        "scaled": (1, 2, 4, 8, 16, 32, 64),
        "full": (1, 2, 4, 8, 16, 32, 64),
    }

    def cells(self, scale: Scale) -> list[Cell]:
        found = {
            f"VeRA rank {rank}": _vera_trial(scale, rank, rank) for rank in self.vera_ranks[scale]
        }
        found |= {f"LoRA rank {rank}": _lora_trial(scale, rank) for rank in self.lora_ranks[scale]}
        return [
            self.cell(scale, _task(scale), method, trial, _model(scale))
            for method, trial in found.items()
        ]

    def page(self, lines: Sequence[Line], scale: Scale) -> str:
        rows = [
            [method, f"{own[0]['trained']:,}", spread(own, score_of, center=statistics.median)]
            for method in dict.fromkeys(line["method"] for line in lines)
            for own in [[line for line in lines if line["method"] == method]]
        ]  # fmt: skip
        return "\n".join([
            f"# {self.name}: {self.about}", "", table(["method", "trained, the head apart", GLUE[lines[0]["task"]].title if lines else "score"], rows),
            "Scaled: MiniLM on SST-2 as in table2, one learning rate for all ranks of a method (VeRA 3e-2, LoRA 2e-3 with alpha = rank). The paper has "
            "RoBERTa-large on RTE, and finds VeRA four points over LoRA at LoRA's size.", "", measured_on(lines), "",
        ])  # fmt: skip

    def draw(self, lines: Sequence[Line], place: Place) -> list[Path]:
        """ranks.png"""
        from veratune.analysis.pictures import draw_lines

        found: dict[str, dict[int, list[float]]] = {}
        for line in lines:
            found.setdefault(line["method"].partition(" ")[0], {}).setdefault(
                line["trained"], []
            ).append(score_of(line))
        series = {
            name: sorted((x, statistics.median(ys)) for x, ys in points.items())
            for name, points in found.items()
        }
        return (
            [
                draw_lines(
                    series,
                    place.out / "ranks.png",
                    "trained values, the head apart",
                    "score",
                    log=True,
                )
            ]
            if lines
            else []
        )


class Figure3(GlueTable):
    name = "figure3"
    about = "the norm of d by layer, query and value, after training (VeRA, figure 3)"
    seeds = {"quick": 1, "scaled": 1, "full": 1}

    def cells(self, scale: Scale) -> list[Cell]:
        cell = self.cell(scale, _task(scale), "VeRA", _vera_trial(scale, 192), _model(scale))
        return [Cell(name=cell.name, shown=cell.shown, run=functools.partial(self._norms, cell))]

    @staticmethod
    def _norms(cell: Cell, place: Place, seed: int, folder: Path) -> Line:
        line = cell.run(place, seed, folder)
        adapter = native.read(_where(line, place, folder) / "adapter.safetensors")
        start = adapter.config.start_d
        return line | {
            "norms": {entry.layer: entry.d_norm for entry in figures(adapter)},
            "start": {layer: start * d.numel() ** 0.5 for layer, d in adapter.d.items()},
        }

    def page(self, lines: Sequence[Line], scale: Scale) -> str:
        rows = [
            [layer, f"{line['start'][layer]:.2f}", f"{norm:.2f}"]
            for line in lines
            for layer, norm in line["norms"].items()
        ]
        return "\n".join([
            f"# {self.name}: {self.about}", "", table(["layer", "norm of d at the start", "after"], rows),
            "The paper's figure (RoBERTa-large, RTE) shows larger d in query than in value, and in later layers.", "", measured_on(lines), "",
        ])  # fmt: skip

    def draw(self, lines: Sequence[Line], place: Place) -> list[Path]:
        """norms.png"""
        from veratune.analysis.pictures import draw_lines

        if not lines:
            return []
        series: dict[str, list[tuple[float, float]]] = {}
        for layer, norm in lines[-1]["norms"].items():
            kind = layer.rpartition(".")[2]
            series.setdefault(kind, []).append((len(series.get(kind, [])), norm))
        return [draw_lines(series, place.out / "norms.png", "layer", "|d| (L2 norm)")]


class Figure4(GlueTable):
    name = "figure4"
    about = "relative gain over the head alone for each thousand trained values (VeRA, figure 4)"
    seeds = {"quick": 1, "scaled": 1, "full": 5}
    methods: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "Head": {"method": "head", "head_lr": 2e-2}, "Houlsby": {"method": "houlsby", "options": {"size": 16}, "lr": 1e-3, "head_lr": 5e-3},
        "Pfeiffer": {"method": "pfeiffer", "options": {"size": 16}, "lr": 1e-3, "head_lr": 5e-3}, "LoRA": _lora(8), "VeRA": RATES,
    }  # fmt: skip
    printed: ClassVar[Mapping[str, str]] = {
        "Houlsby": "0.02 (6M), 0.15 (0.8M)",
        "Pfeiffer": "0.05 (3M), 0.17 (0.8M)",
        "LoRA": "0.18",
        "VeRA": "2.64",
    }

    def cells(self, scale: Scale) -> list[Cell]:
        vera = VeraConfig(rank=192, targets=QV)
        if scale != "full":
            return [
                self.cell(scale, "sst2", method, Trial(settings=settings, vera=vera))
                for method, settings in self.methods.items()
            ]
        trials = {method: paper_trial("rte", LARGE, method) for method in ("Head", "LoRA", "VeRA")}
        base = trials["VeRA"].settings
        for method, size in (
            ("houlsby", 64),
            ("pfeiffer", 64),
        ):  # Zhang et al. 2023: rates from their code for RoBERTa-large
            settings = {
                **base,
                "method": method,
                "options": {"size": size},
                "lr": 3e-4,
                "head_lr": 3e-4,
            }
            trials[method.title()] = Trial(settings=settings, vera=trials["VeRA"].vera)
        return [self.cell(scale, "rte", method, trial, LARGE) for method, trial in trials.items()]

    def page(self, lines: Sequence[Line], scale: Scale) -> str:
        found = {
            method: [line for line in lines if line["method"] == method] for method in self.methods
        }
        head = statistics.median(map(score_of, found["Head"])) if found["Head"] else float("nan")
        rows = []
        for method, own in found.items():
            if not own:
                continue
            score = statistics.median(map(score_of, own))
            thousands = own[0]["trained"] / 1000
            rows.append([
                method, "-" if method == "Head" else f"{own[0]['trained']:,}", f"{score:.1f}", self.printed.get(method, "-"),
                *(["-", "-"] if method == "Head" else [f"{score / head / thousands * 100:.3f}", f"{(score - head) / head / thousands * 100:.3f}"]),
            ])  # fmt: skip
        return "\n".join([
            f"# {self.name}: {self.about}", "",
            table(["method", "trained, the head apart", "score", "printed gain", "printed formula, %", "gain per thousand, %"], rows),
            "The printed formula, accuracy / baseline / parameters * 100, is not a gain: at the baseline's own accuracy it is not zero, and it grows without bound as parameters shrink. "
            "Nor do the printed bars come from one baseline: with RTE's accuracies of table 2, VeRA's 2.64 wants a baseline of 53.0, LoRA's 0.18 one of 59 to 62. "
            "Gain per thousand is (accuracy - baseline) / baseline / thousands of values * 100. Scaled: MiniLM on SST-2 as in table2, untuned rates.", "", measured_on(lines), "",
        ])  # fmt: skip

    def draw(self, lines: Sequence[Line], place: Place) -> list[Path]:
        """gains.png"""
        from veratune.analysis.pictures import draw_bars

        found = {
            method: [score_of(line) for line in lines if line["method"] == method]
            for method in self.methods
        }
        if not all(found.values()):
            return []
        head = statistics.median(found["Head"])
        trained = {line["method"]: line["trained"] for line in lines}
        bars = {
            m: (statistics.median(s) - head) / head / trained[m] * 1e5
            for m, s in found.items()
            if m != "Head"
        }
        return [
            draw_bars(bars, place.out / "gains.png", "gain over the head, % per thousand values")
        ]


class Figure5(GlueTable):
    name = "figure5"
    about = "cosine of ΔW in the query layers: LoRA with VeRA, and LoRA with random matrices (VeRA, figure 5)"
    seeds = {"quick": 1, "scaled": 1, "full": 1}

    def cells(self, scale: Scale) -> list[Cell]:
        task, model = _task(scale), _model(scale)
        trials = (_lora_trial(scale, 64), _vera_trial(scale, 64, 64))
        runs = [
            self.cell(scale, task, method, trial, model)
            for method, trial in zip(("LoRA", "VeRA"), trials, strict=True)
        ]
        shown = {"group": "cosine", "task": task, "method": "cosine", "model": model}
        return [
            Cell(
                name=f"{GLUE[task].title}: cosine",
                shown=shown,
                run=functools.partial(self._cosines, runs[0], runs[1]),
            )
        ]

    @staticmethod
    def _cosines(lora: Cell, vera: Cell, place: Place, seed: int, folder: Path) -> Line:
        """Both runs, then the cosine of each query layer's ΔW."""
        of_lora, of_vera = (
            lora.run(place, seed, folder / "lora"),
            vera.run(place, seed, folder / "vera"),
        )
        adapter = native.read(_where(of_vera, place, folder / "vera") / "adapter.safetensors")
        deltas = deltas_of(adapter)
        file = _where(of_lora, place, folder / "lora") / "trained.safetensors"
        tensors = safetensors.torch.load_file(file)
        generator = torch.Generator().manual_seed(seed)
        with_vera, with_random = {}, {}
        for layer in (name for name in deltas if name.endswith("query")):
            own = (
                tensors[f"{layer}.lora_B.default.weight"]
                @ tensors[f"{layer}.lora_A.default.weight"]
            )
            with_vera[layer] = F.cosine_similarity(own.flatten(), deltas[layer].flatten(), 0).item()
            chance = torch.randn(own.shape, generator=generator)
            with_random[layer] = F.cosine_similarity(own.flatten(), chance.flatten(), 0).item()
        return of_vera | {
            "with_vera": with_vera,
            "with_random": with_random,
            "lora": of_lora["after"],
            "trained_lora": of_lora["trained"],
        }

    def page(self, lines: Sequence[Line], scale: Scale) -> str:
        rows = [
            [layer, f"{value:.4f}", f"{line['with_random'][layer]:.4f}"]
            for line in lines
            for layer, value in line["with_vera"].items()
        ]
        means = [
            f"Means {statistics.mean(line['with_vera'].values()):.1e} and {statistics.mean(line['with_random'].values()):.1e}; printed: 2e-3 and -8e-5."
            for line in lines
        ]
        return "\n".join([
            f"# {self.name}: {self.about}", "", table(["layer", "LoRA and VeRA", "LoRA and random"], rows), *means,
            "Both of rank 64, from equal data, seed and head. The chance cosine of two matrices of 384 x 384 has a standard deviation of 2.6e-3, of 1024 x 1024 one of 1e-3.", "", measured_on(lines), "",
        ])  # fmt: skip

    def draw(self, lines: Sequence[Line], place: Place) -> list[Path]:
        """cosine.png"""
        from veratune.analysis.pictures import draw_lines

        if not lines:
            return []
        last = lines[-1]
        series = {"LoRA and VeRA": last["with_vera"], "LoRA and random": last["with_random"]}
        points = {name: list(enumerate(values.values())) for name, values in series.items()}
        return [draw_lines(points, place.out / "cosine.png", "layer", "cosine of ΔW, query")]


def deltas_of(adapter: Adapter) -> dict[str, Tensor]:
    """ΔW of every layer of an adapter, from its file alone."""
    config, device = adapter.config, torch.device("cpu")
    basis = new_basis(config, dict(adapter.shapes))
    out = {}
    for layer, (m, n) in adapter.shapes.items():
        rank = adapter.ranks[layer]
        A, B = basis.pair(layer, m, n, rank, device, torch.float32)
        out[layer] = delta_weight(
            A, B, adapter.d.get(layer), adapter.b.get(layer), basis.scale(rank, n)
        )
    return out


def _where(line: Line, place: Place, folder: Path) -> Path:
    """The folder of a run: one that is shared among tables, or its own."""
    return place.out.parent / "shared-runs" / line["run"] if "run" in line else folder
