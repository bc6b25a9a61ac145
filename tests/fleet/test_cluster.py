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
from veratune.fleet.fleet import run_fleet
from veratune.formats import native
from veratune.training.fleet.settings import FleetSettings
from veratune.training.settings import TrainSettings

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]
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
    fleet = FleetSettings(workers=2, max_active=2, checkpoint_seconds=0.5)
    killed = []

    def kill_one():
        folder = tmp_path / "ray" / "adapters"
        while not killed:
            workers = workers_of_this_test()
            if len(workers) == 2 and len(list(folder.glob("*"))) >= 2:
                os.kill(workers[0], signal.SIGKILL)
                killed.append(workers[0])
            time.sleep(0.05)

    killer = threading.Thread(target=kill_one, daemon=True)
    killer.start()
    finished = []
    result = run_fleet(
        settings, CONFIG, fleet, finished=lambda line, *_: finished.append(line["tenant"])
    )
    assert killed
    assert not ray.is_initialized()
    assert (result.trained, result.refused) == (12, 0)
    assert sorted(finished) == [f"t{i:02d}" for i in range(12)]
    alone = TrainSettings(**{**vars(settings), "out": str(tmp_path / "alone")})
    run_fleet(alone, CONFIG, FleetSettings())
    for file in (tmp_path / "alone" / "adapters").iterdir():
        ours, theirs = native.read(tmp_path / "ray" / "adapters" / file.name), native.read(file)
        assert all((ours.d[k] - v).abs().max() < 1e-5 for k, v in theirs.d.items())


def test_workers_beside_torchrun_are_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    settings = TrainSettings(
        model="x", task="instruction", data="x", out=str(tmp_path), device="cpu"
    )
    with pytest.raises(ConfigError, match="torchrun has started workers"):
        run_fleet(settings, CONFIG, FleetSettings(workers=2))
