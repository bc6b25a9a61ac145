"""A fleet gives each tenant what `veratune train` gives it alone."""

import dataclasses
import json
import random

import numpy as np
import pytest
import torch

import veratune as vt
from tests import fakes
from veratune.errors import ConfigError, DataError, OutputError, UnsupportedError
from veratune.formats import native
from veratune.training.fleet.loop import train_fleet
from veratune.training.fleet.report import draw_map, draw_scores
from veratune.training.fleet.results import read_results
from veratune.training.fleet.settings import FleetSettings
from veratune.training.fleet.worker import AdapterFolder
from veratune.training.run import train
from veratune.training.settings import TrainSettings

pytestmark = pytest.mark.filterwarnings("ignore")
WORDS = [
    "turn",
    "the",
    "light",
    "in",
    "kitchen",
    "on",
    "off",
    "please",
    "set",
    "timer",
    "for",
    "minutes",
]


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Tiny models; three tenants with commands and three with sentiments, of different sizes."""
    out = tmp_path_factory.mktemp("fleet")
    fakes.folder(fakes.llama(), out / "llama")
    fakes.folder(fakes.bert(), out / "bert")
    fakes.folder(fakes.gpt2(), out / "gpt2")
    rng = random.Random(0)
    commands, sentiments, scores = [], [], []
    for tenant, count in (("ann", 13), ("bob", 8), ("cy", 21)):
        for i in range(count):
            words = " ".join(rng.choices(WORDS, k=rng.randint(1, 9)))
            answer = " ".join(rng.choices(WORDS, k=rng.randint(1, 4)))
            commands.append({"tenant": tenant, "prompt": words, "completion": answer})
            sentiments.append({"tenant": tenant, "text": words, "label": ("a", "b", "c")[i % 3]})
            scores.append({"tenant": tenant, "text": words, "label": 50.0 + 7 * len(words)})
    write(out / "commands.jsonl", commands)
    write(out / "sentiments.jsonl", sentiments)
    write(out / "scores.jsonl", scores)
    for tenant in ("ann", "bob", "cy"):
        for name, rows in (("commands", commands), ("sentiments", sentiments), ("scores", scores)):
            own = [
                {k: v for k, v in row.items() if k != "tenant"}
                for row in rows
                if row["tenant"] == tenant
            ]
            write(out / name / f"{tenant}.jsonl", own)
    return out


def settings(place, model, task, data, out, **more):
    return TrainSettings(
        model=str(place / model),
        task=task,
        data=str(place / data),
        out=str(out),
        **({"head_lr": 1e-2} if model == "bert" else {}),
        **{"lr": 2e-2, "batch_size": 4, "device": "cpu", "keep": "last", **more},
    )


def assert_equal_adapters(fleet, alone, tolerance=1e-5):
    for kind in ("d", "b", "head"):
        ours, theirs = getattr(fleet, kind), getattr(alone, kind)
        assert ours.keys() == theirs.keys()
        for name, tensor in ours.items():
            torch.testing.assert_close(tensor, theirs[name], rtol=1e-4, atol=tolerance)


@pytest.mark.parametrize(
    ("model", "task", "data", "vera"),
    [
        ("llama", "instruction", "commands", vt.VeraConfig(rank=8)),
        ("gpt2", "instruction", "commands", vt.VeraConfig(rank=8, targets="all-linear")),
        ("llama", "instruction", "commands", vt.VeraConfig(rank=8, basis="monarch")),
        ("bert", "text-classification", "sentiments", vt.VeraConfig(rank=6, vectors="d")),
        ("bert", "text-regression", "scores", vt.VeraConfig(rank=6)),
    ],
    ids=["llama", "gpt2-parts", "monarch", "bert-heads", "bert-regression"],
)
def test_each_tenant_equals_the_run_of_that_tenant_alone(model, task, data, vera, place, tmp_path):
    common = {"max_steps": 50, "lr_scheduler": "cosine"}
    result = train_fleet(
        settings(place, model, task, f"{data}.jsonl", tmp_path / "fleet", **common),
        vera,
        FleetSettings(max_batch_tokens=64),
    )
    assert (result.trained, result.refused, result.steps) == (3, 0, 150)
    for tenant in ("ann", "bob", "cy"):
        alone = train(
            settings(place, model, task, f"{data}/{tenant}.jsonl", tmp_path / tenant, **common),
            vera,
        )
        ours = native.read(tmp_path / "fleet" / "adapters" / f"{tenant}.safetensors")
        theirs = native.read(alone.path)
        assert_equal_adapters(ours, theirs)
        assert dataclasses.replace(ours.config) == theirs.config
        assert ours.task == theirs.task


def test_the_order_of_steps_and_the_size_of_batches_change_nothing(place, tmp_path):
    """Few slots, few tenants a step, small passes: tenants enter and leave at other times."""
    base = settings(place, "llama", "instruction", "commands.jsonl", tmp_path / "wide", epochs=3)
    train_fleet(base, vt.VeraConfig(rank=8), FleetSettings())
    narrow = dataclasses.replace(base, out=str(tmp_path / "narrow"))
    train_fleet(
        narrow,
        vt.VeraConfig(rank=8),
        FleetSettings(max_active=2, tenants_per_step=1, max_batch_tokens=1),
    )
    for tenant in ("ann", "bob", "cy"):
        wide, small = (
            native.read(tmp_path / name / "adapters" / f"{tenant}.safetensors")
            for name in ("wide", "narrow")
        )
        assert_equal_adapters(wide, small)


def test_evaluation_keeps_the_best_and_stops_early(place, tmp_path):
    result = train_fleet(
        settings(
            place, "bert", "text-classification", "sentiments.jsonl", tmp_path / "out",
            epochs=6, keep="best", patience=1, lr=5e-2,
        ),
        vt.VeraConfig(rank=6),
        FleetSettings(eval_fraction=0.25),
    )  # fmt: skip
    assert result.trained == 3
    for line in result.results:
        assert line["held_out"] == round((line["examples"] + line["held_out"]) * 0.25)
        assert {"loss", "accuracy"} <= set(line["before"])
        assert line["best_step"] <= line["steps"]
    lines = read_results(tmp_path / "out")
    assert [line["tenant"] for line in lines] == ["ann", "bob", "cy"]
    assert draw_scores(lines, "accuracy", tmp_path / "scores.png").is_file()
    assert draw_map(
        AdapterFolder(tmp_path / "out" / "adapters"), ["ann", "bob", "cy"], tmp_path / "map.png"
    ).is_file()


def test_a_bad_tenant_is_refused_alone(place, tmp_path):
    rows = [json.loads(line) for line in (place / "commands.jsonl").read_text().splitlines()]
    rows.append({"tenant": "no/name", "prompt": "light", "completion": "on"})
    rows.append({"tenant": "dan", "prompt": "light", "completion": None})
    write(tmp_path / "data.jsonl", rows)
    given = settings(place, "llama", "instruction", "x", tmp_path / "out", epochs=1)
    given = dataclasses.replace(given, data=str(tmp_path / "data.jsonl"))
    result = train_fleet(given, vt.VeraConfig(rank=4), FleetSettings())
    reasons = {line["tenant"]: line.get("reason", "") for line in result.results}
    assert (result.trained, result.refused) == (3, 2)
    assert "'no/name' is not valid" in reasons["no/name"]
    assert "text or messages are wanted" in reasons["dan"]
    strict = dataclasses.replace(given, out=str(tmp_path / "strict"))
    with pytest.raises(DataError, match="tenant 'dan'"):
        train_fleet(strict, vt.VeraConfig(rank=4), FleetSettings(strict=True))


def test_a_tenant_that_diverges_stops_alone(place, tmp_path, monkeypatch):
    from veratune.training.fleet import fleet as module

    alone = train_fleet(
        settings(place, "llama", "instruction", "commands.jsonl", tmp_path / "good", epochs=2),
        vt.VeraConfig(rank=8),
        FleetSettings(),
    )
    assert alone.trained == 3
    start = module.FleetTrainer.enter

    def poisoned(self, slot, row):
        start(self, slot, row)
        if slot == 1:
            self.values[slot, 0] = float("nan")

    monkeypatch.setattr(module.FleetTrainer, "enter", poisoned)
    result = train_fleet(
        settings(place, "llama", "instruction", "commands.jsonl", tmp_path / "bad", epochs=2),
        vt.VeraConfig(rank=8),
        FleetSettings(),
    )
    refused = [line for line in result.results if line["status"] == "refused"]
    assert len(refused) == 1
    assert "not finite at step 1" in refused[0]["reason"]
    for line in result.results:
        if line["status"] == "trained":
            name = f"{line['tenant']}.safetensors"
            assert_equal_adapters(
                native.read(tmp_path / "bad" / "adapters" / name),
                native.read(tmp_path / "good" / "adapters" / name),
            )


def test_a_killed_fleet_goes_on_to_the_same_adapters(place, tmp_path, monkeypatch):
    from veratune.training.fleet import fleet as module

    whole = settings(place, "llama", "instruction", "commands.jsonl", tmp_path / "whole", epochs=4)
    train_fleet(whole, vt.VeraConfig(rank=8), FleetSettings(eval_fraction=0.2))
    cut = dataclasses.replace(whole, out=str(tmp_path / "cut"))
    taken, step = [0], module.FleetTrainer.step

    def dying(self, runs):
        taken[0] += 1
        if taken[0] == 9:
            raise KeyboardInterrupt
        return step(self, runs)

    monkeypatch.setattr(module.FleetTrainer, "step", dying)
    fleet = FleetSettings(checkpoint_seconds=0, eval_fraction=0.2)
    with pytest.raises(KeyboardInterrupt):
        train_fleet(cut, vt.VeraConfig(rank=8), fleet)
    monkeypatch.undo()
    finished = len(list((tmp_path / "cut" / "adapters").glob("*.safetensors")))
    assert 0 < finished < 3
    resumed = train_fleet(dataclasses.replace(cut, resume=True), vt.VeraConfig(rank=8), fleet)
    assert resumed.trained == 3
    for tenant in ("ann", "bob", "cy"):
        ours, theirs = (
            native.read(tmp_path / name / "adapters" / f"{tenant}.safetensors")
            for name in ("cut", "whole")
        )
        assert_equal_adapters(ours, theirs, 1e-6)
    with pytest.raises(ConfigError, match="started with lr"):
        train_fleet(dataclasses.replace(cut, resume=True, lr=1.0), vt.VeraConfig(rank=8), fleet)
    with pytest.raises(OutputError):
        train_fleet(cut, vt.VeraConfig(rank=8), fleet)


def test_warm_starts(place, tmp_path):
    first = settings(place, "llama", "instruction", "commands.jsonl", tmp_path / "one", epochs=2)
    vera = vt.VeraConfig(rank=8)
    train_fleet(first, vera, FleetSettings())
    folder = tmp_path / "one" / "adapters"
    again = dataclasses.replace(first, out=str(tmp_path / "two"), lr=1e-12)
    train_fleet(again, vera, FleetSettings(continue_from=str(folder)))
    start = str(folder / "ann.safetensors")
    third = dataclasses.replace(again, out=str(tmp_path / "three"), start_adapter=start)
    train_fleet(third, vera, FleetSettings())
    for tenant in ("ann", "bob", "cy"):
        name = f"{tenant}.safetensors"
        assert_equal_adapters(
            native.read(tmp_path / "two" / "adapters" / name), native.read(folder / name), 1e-6
        )
        assert_equal_adapters(
            native.read(tmp_path / "three" / "adapters" / name),
            native.read(folder / "ann.safetensors"),
            1e-6,
        )


def test_workers_share_the_tenants(place, tmp_path):
    given = settings(place, "llama", "instruction", "commands.jsonl", tmp_path / "out", epochs=1)
    for rank in (0, 1):
        train_fleet(given, vt.VeraConfig(rank=4), FleetSettings(), rank=rank, world=2)
    assert [line["tenant"] for line in read_results(tmp_path / "out")] == ["ann", "bob", "cy"]


def test_a_folder_with_a_file_per_tenant(place, tmp_path):
    given = settings(place, "llama", "instruction", "commands", tmp_path / "out", epochs=1)
    assert train_fleet(given, vt.VeraConfig(rank=4), FleetSettings()).trained == 3


@pytest.mark.parametrize(
    ("change", "vera", "error", "words"),
    [
        ({"method": "bitfit"}, {}, ConfigError, "method is 'bitfit'"),
        ({"ema": 0.9}, {}, ConfigError, "ema is 0.9"),
        ({"patience": 2}, {}, ConfigError, "nothing to evaluate on"),
        ({}, {"dropout": 0.1}, UnsupportedError, "no adapter dropout"),
        ({"task": "unconditional-image"}, {}, Exception, ""),
    ],
)
def test_what_a_fleet_cannot_do_is_refused(change, vera, error, words, place, tmp_path):
    given = settings(place, "llama", "instruction", "commands.jsonl", tmp_path / "out")
    with pytest.raises(error, match=words):
        train_fleet(
            dataclasses.replace(given, **change), vt.VeraConfig(rank=4, **vera), FleetSettings()
        )


def test_values_of_the_layout_are_those_of_the_adapter(place, tmp_path):
    from veratune.stacked import VectorLayout
    from veratune.targets import find_sites

    model = fakes.llama()
    config = vt.VeraConfig(rank=5, targets="all-linear")
    vt.attach(model, config, "a")
    fakes.scramble(model, "a")
    adapter = vt.extract(model, "a")
    layout = VectorLayout(find_sites(model, config), config)
    row = layout.pack(adapter.d, adapter.b)
    assert row.shape == (layout.size,)
    d, b = layout.unpack(row)
    assert all(torch.equal(d[k], v) for k, v in adapter.d.items())
    assert all(torch.equal(b[k], v) for k, v in adapter.b.items())
    assert np.isclose(layout.is_b().sum().item(), sum(v.numel() for v in adapter.b.values()))
