"""Bad tenants, unfair tenants, killed runs, and more tenants than memory."""

import json
import os
import resource
import signal
import subprocess
import sys
import time

import pytest

import veratune as vt
from tests import fakes
from veratune.errors import ConfigError, VeratuneError
from veratune.formats import native
from veratune.training.fleet.loop import train_fleet
from veratune.training.fleet.results import read_results
from veratune.training.fleet.settings import FleetSettings
from veratune.training.settings import TrainSettings

pytestmark = pytest.mark.filterwarnings("ignore")
CONFIG = vt.VeraConfig(rank=4)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    out = tmp_path_factory.mktemp("robust")
    fakes.folder(fakes.llama(num_hidden_layers=1), out / "llama")
    fakes.folder(fakes.bert(), out / "bert")
    return out


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rows_of(tenant, count, word="on"):
    return [
        {"tenant": tenant, "prompt": f"light {i}", "completion": f"{word} {i % 3}"}
        for i in range(count)
    ]


def settings(place, data, out, model="llama", task="instruction", **more):
    common = {"lr": 2e-2, "batch_size": 2, "epochs": 1, "device": "cpu", "keep": "last"}
    return TrainSettings(
        model=str(place / model), task=task, data=str(data), out=str(out), **{**common, **more}
    )


def test_a_tenant_with_very_many_examples_holds_up_nobody(place, tmp_path):
    """It takes one step per turn, as the others do, and --max-examples caps it."""
    rows = rows_of("giant", 60) + [r for i in range(9) for r in rows_of(f"t{i}", 4)]
    data = write(tmp_path / "data.jsonl", rows)
    finished = []

    def note(line, done, total):
        finished.append((line["tenant"], line["steps"]))

    fleet = FleetSettings(max_active=3, tenants_per_step=3)
    train_fleet(settings(place, data, tmp_path / "all"), CONFIG, fleet, finished=note)
    assert finished[-1] == ("giant", 30)
    assert {steps for name, steps in finished if name != "giant"} == {2}
    finished.clear()
    fleet = FleetSettings(max_active=3, tenants_per_step=3, max_examples=6)
    train_fleet(settings(place, data, tmp_path / "capped"), CONFIG, fleet, finished=note)
    assert dict(finished)["giant"] == 3


def test_examples_that_fit_no_tenant_refuse_that_tenant(place, tmp_path):
    folder = tmp_path / "tenants"
    own = [{k: v for k, v in row.items() if k != "tenant"} for row in rows_of("x", 3)]
    write(folder / "ann.jsonl", own)
    write(folder / "empty.jsonl", [])
    write(folder / "mixed.jsonl", [{"text": "a", "label": "b"}])  # another task's columns
    write(folder / "long.jsonl", [{"prompt": "light " * 200, "completion": "on"}])
    write(folder / "twice.jsonl", own + own)  # duplicates are examples like others
    result = train_fleet(
        settings(place, folder, tmp_path / "out", max_length=64), CONFIG, FleetSettings()
    )
    reasons = {line["tenant"]: line.get("reason") for line in result.results}
    assert reasons["ann"] is None
    assert reasons["twice"] is None
    assert all(reasons[name] for name in ("empty", "mixed", "long"))
    steps = {line["tenant"]: line.get("steps") for line in result.results}
    assert (steps["ann"], steps["twice"]) == (2, 3)


def test_two_files_of_one_tenant_are_refused(place, tmp_path):
    write(tmp_path / "t" / "ann.jsonl", rows_of("ann", 2))
    (tmp_path / "t" / "ann.csv").write_text("prompt,completion\na,b\n")
    with pytest.raises(VeratuneError, match="name the same tenant"):
        train_fleet(settings(place, tmp_path / "t", tmp_path / "out"), CONFIG, FleetSettings())


def test_a_label_that_only_a_later_tenant_has_refuses_it(place, tmp_path):
    """All tenants share one list of labels, which the first tenants' files give."""
    folder = tmp_path / "tenants"
    for i in range(201):
        labels = ("a", "b") if i < 200 else ("a", "new")
        rows = [{"text": f"light {j}", "label": labels[j % 2]} for j in range(2)]
        write(folder / f"t{i:03d}.jsonl", rows)
    result = train_fleet(
        settings(place, folder, tmp_path / "out", "bert", "text-classification", max_steps=1),
        CONFIG,
        FleetSettings(),
    )
    assert (result.trained, result.refused) == (200, 1)
    (refused,) = [line for line in result.results if line["status"] == "refused"]
    assert refused["tenant"] == "t200"
    assert "new" in refused["reason"]


def test_keep_best_wants_evaluation(place, tmp_path):
    data = write(tmp_path / "data.jsonl", rows_of("ann", 2))
    with pytest.raises(ConfigError, match="nothing to evaluate on"):
        train_fleet(settings(place, data, tmp_path / "out", keep="best"), CONFIG, FleetSettings())


def test_more_tenants_than_active_ones_stream(place, tmp_path):
    """40 tenants through 4 slots: each is encoded when it enters, and frees its slot."""
    rows = [row for i in range(40) for row in rows_of(f"t{i:04d}", 1)]
    data = write(tmp_path / "data.jsonl", rows)
    slots = FleetSettings(max_active=4, tenants_per_step=3)
    result = train_fleet(settings(place, data, tmp_path / "out", max_steps=1), CONFIG, slots)
    assert result.trained == 40


@pytest.mark.slow
def test_memory_grows_with_the_active_tenants_alone(place, tmp_path):
    with (tmp_path / "data.jsonl").open("w") as file:
        for i in range(2_000):
            file.write(json.dumps(rows_of(f"t{i:06d}", 1)[0]) + "\n")
    peaks = []

    class Nowhere:
        def put(self, tenant, adapter):
            return 1

    def note(line, done, total):
        if done % 500 == 0:
            peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)

    result = train_fleet(
        settings(place, tmp_path / "data.jsonl", tmp_path / "out", max_steps=1),
        CONFIG,
        FleetSettings(max_active=64, tenants_per_step=64, checkpoint_seconds=3600),
        sink=Nowhere(),
        finished=note,
    )
    assert result.trained == 2_000
    print(json.dumps({"peak_rss_kib": peaks, "seconds": round(result.seconds)}))
    assert peaks[-1] - peaks[0] < 30 * 1024  # KiB, for 1,500 tenants


@pytest.mark.slow
def test_kill_9_loses_no_tenant(place, tmp_path):
    """A real process is killed twice; the resumed run equals one that nobody killed."""
    rows = [row for i in range(12) for row in rows_of(f"t{i:02d}", 4 + i)]
    data = write(tmp_path / "data.jsonl", rows)
    flags = {
        "model": place / "llama", "task": "instruction", "data": data, "epochs": 12, "rank": 4,
        "lr": 0.02, "batch-size": 2, "device": "cpu", "keep": "last", "max-active": 4,
        "checkpoint-seconds": 0.5,
    }  # fmt: skip
    words = [sys.executable, "-m", "veratune.cli.main", "train-fleet"]
    words += [word for key, value in flags.items() for word in (f"--{key}", str(value))]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    quiet = {"stderr": subprocess.DEVNULL, "stdout": subprocess.DEVNULL}
    subprocess.run([*words, "--out", str(whole)], check=True, **quiet)
    for kill in range(2):
        resume = ["--resume", "true"] if kill else []
        process = subprocess.Popen([*words, "--out", str(cut), *resume], **quiet)
        wanted = 3 * (kill + 1)
        while process.poll() is None and len(list(cut.glob("adapters/t*"))) < wanted:
            time.sleep(0.05)
        assert process.poll() is None
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    subprocess.run([*words, "--out", str(cut), "--resume", "true"], check=True, **quiet)
    lines = read_results(cut)
    assert [line["status"] for line in lines] == ["trained"] * 12
    for file in (whole / "adapters").iterdir():
        ours, theirs = native.read(cut / "adapters" / file.name), native.read(file)
        assert all((ours.d[k] - v).abs().max() < 1e-5 for k, v in theirs.d.items())
    assert not list(cut.rglob("*.tmp"))
