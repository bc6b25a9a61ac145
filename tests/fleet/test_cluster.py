"""Ray workers share a fleet's tenants; one that is killed is replaced."""

import json
import os
import signal
import threading
import time

import psutil
import pytest

import veratune as vt
from tests import fakes
from veratune.errors import ConfigError
from veratune.fleet.fleet import open_adapters, run_fleet
from veratune.formats import native
from veratune.training.fleet.results import read_results
from veratune.training.fleet.settings import FleetSettings
from veratune.training.settings import TrainSettings

pytestmark = pytest.mark.filterwarnings("ignore")
CONFIG = vt.VeraConfig(rank=4)


def workers_of_this_test():
    """Pids of running fleet workers among this process' descendants."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if "FleetWorker.run" in " ".join(process.cmdline()):
                found.append(process.pid)
        except psutil.Error:
            continue
    return found


@pytest.mark.slow
def test_a_killed_worker_is_replaced_and_nothing_is_lost(tmp_path):
    ray = pytest.importorskip("ray")
    fakes.folder(fakes.llama(num_hidden_layers=1), tmp_path / "llama")
    with (tmp_path / "data.jsonl").open("w") as file:
        for tenant in range(12):
            for i in range(6 + tenant):
                row = {"tenant": f"t{tenant:02d}", "prompt": f"light {i}", "completion": "on"}
                file.write(json.dumps(row) + "\n")
    common = {"lr": 2e-2, "batch_size": 2, "epochs": 20, "device": "cpu", "keep": "last"}
    settings = TrainSettings(
        model=str(tmp_path / "llama"),
        task="instruction",
        data=str(tmp_path / "data.jsonl"),
        out=str(tmp_path / "ray"),
        **common,
    )
    store = str(tmp_path / "store.db")
    fleet = FleetSettings(workers=2, max_active=2, checkpoint_seconds=0.5, store=store)
    killed = []

    def kill_one():
        folder = tmp_path / "ray"
        while not killed:
            workers = workers_of_this_test()
            if len(workers) == 2 and len(read_results(folder)) >= 2:
                os.kill(workers[0], signal.SIGKILL)
                killed.append(workers[0])
            time.sleep(0.05)

    killer = threading.Thread(target=kill_one, daemon=True)
    killer.start()
    finished = []
    result = run_fleet(
        settings, CONFIG, fleet, finished=lambda line, *counts: finished.append((line, counts))
    )
    assert killed
    assert not ray.is_initialized()
    assert (result.trained, result.refused) == (12, 0)
    assert sorted(line["tenant"] for line, _ in finished) == [f"t{i:02d}" for i in range(12)]
    assert [counts for _, counts in finished] == [(i + 1, 12) for i in range(12)]
    alone = TrainSettings(**{**vars(settings), "out": str(tmp_path / "alone")})
    run_fleet(alone, CONFIG, FleetSettings())
    with open_adapters(store, fleet.adapter_name) as published:
        for file in (tmp_path / "alone" / "adapters").iterdir():
            ours, theirs = published.get(file.stem), native.read(file)
            for kind in ("d", "b"):
                for name, values in getattr(theirs, kind).items():
                    assert (getattr(ours, kind)[name] - values).abs().max() < 1e-5
            versions = published.store.versions(file.stem, fleet.adapter_name)
            assert [version.number for version in versions] == [1]


def test_workers_beside_torchrun_are_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    settings = TrainSettings(
        model="x", task="instruction", data="x", out=str(tmp_path), device="cpu"
    )
    with pytest.raises(ConfigError, match="torchrun has started workers"):
        run_fleet(settings, CONFIG, FleetSettings(workers=2))


@pytest.mark.parametrize(
    ("nodes", "workers", "share"),
    [
        ([{"CPU": 2}], 2, {"num_cpus": 1, "num_gpus": 0}),
        ([{"CPU": 16, "GPU": 2}], 2, {"num_cpus": 8, "num_gpus": 1}),
        ([{"CPU": 5}, {"CPU": 5}], 3, {"num_cpus": 2, "num_gpus": 0}),  # 3 each fit two alone
    ],
)
def test_each_worker_gets_its_share_of_the_cluster(nodes, workers, share):
    cluster = pytest.importorskip("veratune.fleet.cluster")
    assert cluster.share_of(nodes, workers) == share


@pytest.mark.parametrize(
    ("node", "words"), [({"CPU": 2}, "has 2 cores"), ({"CPU": 8, "GPU": 1}, "has 1 GPUs")]
)
def test_a_cluster_that_is_too_small_is_refused(node, words):
    cluster = pytest.importorskip("veratune.fleet.cluster")
    with pytest.raises(ConfigError, match=words):
        cluster.share_of([node], 3)
