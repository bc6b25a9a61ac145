"""Fine-tuning jobs: a real run over HTTP with the openai client, and what happens when servers and runs are cut off."""

import json
import os
import signal
import subprocess
import sys
import time

import openai
import pytest

from tests import fakes
from tests.serving.fakes import small_llama
from tests.serving.http.test_app import FILES, Served
from veratune.errors import ConfigError, DataError, JobNotFoundError, QueueFullError
from veratune.formats import native
from veratune.serving.jobs.jobs import Base, Jobs
from veratune.serving.store.base import Version

ROWS = [{"prompt": f"turn the light {word}", "completion": word} for word in ("on", "off")] * 4
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
CHAT = Base("", "instruction", (("messages",), ("prompt", "completion")))

# Stands for `veratune train`: tells its progress, waits for a file called go, and writes an adapter.
TRAINER = """
import json, pathlib, shutil, sys, time
words = sys.argv[1:]
out = pathlib.Path(words[words.index("--out") + 1])
out.mkdir(parents=True, exist_ok=True)
(out / "run.yaml").write_text("x")
with (out / "starts").open("a") as starts:
    starts.write(f"resumed {'--resume' in words}\\n")
print("  5%|#    | 1/20 [00:01<00:10]", file=sys.stderr, flush=True)
print("epoch 1  loss 0.5", file=sys.stderr, flush=True)
here = pathlib.Path(__file__).parent
while not (here / "go").exists():
    time.sleep(0.02)
if (here / "go").read_text() == "fail":
    sys.exit("veratune: the loss is not finite at step 3")
shutil.copy(here / "made.safetensors", out / "adapter.safetensors")
print(json.dumps({"path": "x", "trained": 7}))
"""


class Bench:
    """Jobs whose runs are in our hands."""

    def __init__(self, path, **options):
        self.path, self.options, self.published = path, options, []
        (path / "trainer.py").write_text(TRAINER)
        (path / "made.safetensors").write_bytes(FILES["alice"])
        self.open()

    def open(self):
        def publish(tenant, name, data):
            self.published.append((tenant, name, data))
            return Version(len(self.published), len(data), time.time())

        command = (sys.executable, str(self.path / "trainer.py"))
        self.jobs = Jobs(
            self.path / "jobs", {"base": CHAT}, publish, command=command, **self.options
        )

    def go(self, how="go"):
        (self.path / "go").write_text(how)

    def add(self, tenant="ann", **more):
        file = self.jobs.add_file(tenant, "rows.jsonl", "fine-tune", LINES)
        return self.jobs.add(tenant, "base", file.id, **more)

    def until(self, job, *statuses, seconds=30):
        end = time.time() + seconds
        while time.time() < end:
            found = self.jobs.job(job.tenant, job.id)
            if found.status in statuses:
                return found
            time.sleep(0.02)
        raise AssertionError(f"{found} is not {statuses}")

    def starts(self, job):
        return (self.path / "jobs" / job.id / "run" / "starts").read_text().split("\n")[:-1]

    def until_started(self, job, times=1, seconds=30):
        end = time.time() + seconds
        while time.time() < end:
            if (self.path / "jobs" / job.id / "run" / "starts").exists() and len(
                self.starts(job)
            ) == times:
                return
            time.sleep(0.02)
        raise AssertionError("the run did not start")


@pytest.fixture
def bench(tmp_path):
    made = Bench(tmp_path)
    yield made
    made.jobs.close()


def test_jobs_run_one_after_the_other_and_tell_how_far_they_are(bench):
    one, two = bench.add(adapter="house"), bench.add("ben")
    bench.jobs.start()
    bench.until_started(one)
    end = time.time() + 10
    while bench.jobs.job("ann", one.id).steps != 20 and time.time() < end:
        time.sleep(0.02)
    assert bench.jobs.job("ann", one.id).step == 1
    assert bench.jobs.job("ben", two.id).status == "queued"
    bench.go()
    done = bench.until(one, "succeeded")
    assert (done.version, done.result) == (1, {"trained": 7})
    bench.until(two, "succeeded")
    assert bench.published == [("ann", "house", FILES["alice"]), ("ben", two.id, FILES["alice"])]
    said = [event.message for event in bench.jobs.events("ann", one.id)]
    assert said[0] == "the adapter 'house' is there, version 1"
    assert "epoch 1  loss 0.5" in said
    assert [event.number for event in bench.jobs.events("ann", one.id, limit=2)] == sorted(
        (event.number for event in bench.jobs.events("ann", one.id)), reverse=True
    )[:2]


def test_a_run_that_fails_says_why(bench):
    bench.go("fail")
    job = bench.add()
    bench.jobs.start()
    failed = bench.until(job, "failed")
    assert failed.error == "the loss is not finite at step 3"
    assert bench.published == []


def test_a_job_is_cancelled_while_it_waits_and_while_it_runs(bench):
    running, waiting = bench.add(), bench.add()
    bench.jobs.start()
    bench.until_started(running)
    assert bench.jobs.cancel("ann", waiting.id).status == "cancelled"
    assert bench.jobs.cancel("ann", running.id).status == "cancelled"
    last = bench.add()
    bench.go()
    bench.until(last, "succeeded")
    assert bench.jobs.job("ann", running.id).status == "cancelled"
    assert len(bench.published) == 1


def test_jobs_go_on_after_a_restart(bench):
    one, two = bench.add(), bench.add()
    bench.jobs.start()
    bench.until_started(one)
    bench.jobs.close()
    bench.open()
    assert bench.jobs.job("ann", one.id).status == "running"
    bench.jobs.start()
    bench.until_started(one, times=2)
    assert bench.starts(one) == ["resumed False", "resumed True"]
    bench.go()
    bench.until(two, "succeeded")
    assert bench.jobs.job("ann", one.id).status == "succeeded"


def test_a_run_that_a_killed_server_left_behind_is_ended(bench):
    job = bench.add()
    code = f"""
import sys, time
from tests.serving.jobs.test_jobs import CHAT, Jobs
jobs = Jobs({str(bench.path / "jobs")!r}, {{"base": CHAT}}, None, command=({sys.executable!r}, {str(bench.path / "trainer.py")!r}))
jobs.start()
time.sleep(60)
"""
    bench.jobs.close()
    server = subprocess.Popen([sys.executable, "-c", code])
    bench.until_started(job)
    os.kill(server.pid, signal.SIGKILL)
    server.wait()
    left = int((bench.path / "jobs" / job.id / "pid").read_text())
    os.kill(left, 0)
    bench.open()
    bench.jobs.start()
    bench.until_started(job, times=2)
    with pytest.raises(ProcessLookupError):
        os.kill(left, 0)
    bench.go()
    bench.until(job, "succeeded")


def test_what_is_wrong_is_said_at_once(tmp_path):
    bench = Bench(tmp_path, waiting_tenant=1, files_tenant=3)
    jobs = bench.jobs
    for data, why in (
        (b"", "no rows"),
        (b'{"a": 1}\n[1]\n', "line 2 is no JSON object"),
        (b"\xff\n", "line 1 is no JSON object"),
        (b'{"a": "\\ud800"}\n', "line 1 is no JSON object in Unicode"),
    ):
        with pytest.raises(DataError, match=why):
            jobs.add_file("ann", "x", "fine-tune", data)
    wrong = jobs.add_file("ann", "x", "fine-tune", b'{"question": "a"}')
    with pytest.raises(
        DataError,
        match="line 1 has question; for the model 'base' a row has messages, or prompt and completion",
    ):
        jobs.add("ann", "base", wrong.id)
    with pytest.raises(ConfigError, match="'gpt' cannot be fine-tuned here; 'base' is wanted"):
        jobs.add("ann", "gpt", wrong.id)
    with pytest.raises(JobNotFoundError):
        jobs.add("ben", "base", wrong.id)
    job = bench.add()
    with pytest.raises(QueueFullError, match="1 jobs of this tenant are waiting"):
        bench.add()
    with pytest.raises(QueueFullError, match="3 files already"):
        jobs.add_file("ann", "x", "fine-tune", LINES)
    with pytest.raises(QueueFullError, match="learns from file"):
        jobs.drop_file("ann", job.file)
    for name in ("job", "cancel", "events"):
        with pytest.raises(JobNotFoundError):
            getattr(jobs, name)("ben", job.id)
    jobs.cancel("ann", job.id)
    jobs.drop_file("ann", job.file)
    assert [file.id for file in jobs.files("ann")][-1] == wrong.id
    jobs.close()


def test_the_openai_client_fine_tunes_and_asks_the_result(tmp_path):
    """A real run of `veratune train` on a tiny model, whose adapter then answers."""
    base = fakes.folder(small_llama(), tmp_path / "base")
    served = Served(tmp_path, jobs={"base": Base(base, CHAT.task, CHAT.columns)})
    try:
        with served.openai("ann") as ann, served.openai("ben") as ben:
            file = ann.files.create(file=("rows.jsonl", LINES), purpose="fine-tune")
            assert (file.bytes, file.filename) == (len(LINES), "rows.jsonl")
            assert ann.files.content(file.id).content == LINES
            job = ann.fine_tuning.jobs.create(
                model="base", training_file=file.id, suffix="mine", extra_body={"vera": {"rank": 6, "targets": ["query", "value"]}},
                method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2, "batch_size": 4}}},
            )  # fmt: skip
            for call in (
                ben.fine_tuning.jobs.retrieve,
                ben.fine_tuning.jobs.cancel,
                ben.fine_tuning.jobs.list_events,
            ):
                with pytest.raises(openai.NotFoundError):
                    call(job.id)
            with pytest.raises(openai.NotFoundError):
                ben.files.retrieve(file.id)
            end = time.time() + 600  # the run gives way to everything else on the machine
            while (job := ann.fine_tuning.jobs.retrieve(job.id)).status not in (
                "succeeded",
                "failed",
            ) and time.time() < end:
                time.sleep(0.2)
            assert job.status == "succeeded", job.error
            assert job.fine_tuned_model == "mine"
            said = [event.message for event in ann.fine_tuning.jobs.list_events(job.id)]
            assert said[0] == "the adapter 'mine' is there, version 1"
            assert [j.id for j in ann.fine_tuning.jobs.list()] == [job.id]
            assert (
                ann.completions.create(
                    model="mine", prompt=[4, 5], max_tokens=2, temperature=0
                ).usage.completion_tokens
                >= 1
            )
            with pytest.raises(openai.NotFoundError):
                ben.completions.create(model="mine", prompt=[4], max_tokens=1)
            with pytest.raises(openai.BadRequestError, match="cannot be used"):
                ann.fine_tuning.jobs.create(model="base", training_file=file.id, suffix="../up")
            with pytest.raises(openai.BadRequestError, match="config"):
                ann.fine_tuning.jobs.create(
                    model="base",
                    training_file=file.id,
                    extra_body={"vera": {"config": "/etc/passwd"}},
                )
            ann.files.delete(file.id)
        made = native.decode(served.store.get("ann", "mine", 1))
        assert (made.config.rank, made.task["name"]) == (6, "instruction")
        assert any(float(b.abs().max()) > 0 for b in made.b.values())
    finally:
        served.stop()
