"""Fine-tuning jobs: a real run over HTTP with the openai client, and what happens when servers and runs are cut off."""

import dataclasses
import os
import signal
import subprocess
import sys
import time

import openai
import pytest

from tests import fakes
from tests.serving.fakes import small_llama
from tests.serving.http.fakes import FILES, RunningServer
from tests.serving.jobs.fakes import CHAT, LINES, JobBench
from veratune.errors import (
    ConfigError,
    DataError,
    InUseError,
    JobNotFoundError,
    QueueFullError,
    StoreError,
    UnsupportedError,
)
from veratune.formats import native
from veratune.serving.jobs.models import TrainableModel
from veratune.serving.jobs.process import without_paths


@pytest.fixture
def bench(tmp_path):
    made = JobBench(tmp_path)
    yield made
    made.jobs.close()


def test_jobs_run_one_after_the_other_and_tell_how_far_they_are(bench):
    one, two = bench.create(adapter="house"), bench.create("ben")
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
    assert said[0] == "the adapter 'house' is published as version 1"
    assert "epoch 1  loss 0.5" in said
    assert [event.number for event in bench.jobs.events("ann", one.id, limit=2)] == sorted(
        (event.number for event in bench.jobs.events("ann", one.id)), reverse=True
    )[:2]


def test_what_follows_a_publication_is_in_the_jobs_log(bench):
    called = []

    def on_published(tenant, adapter, data):
        called.append((tenant, adapter, data))
        return "and its inputs are embedded"

    model = dataclasses.replace(CHAT, on_published=on_published)
    bench.jobs.worker.models = {"base": model}
    bench.go()
    job = bench.create(adapter="house")
    bench.jobs.start()
    bench.until(job, "succeeded")
    assert called == [("ann", "house", LINES)]
    messages = [event.message for event in bench.jobs.events("ann", job.id)]
    assert messages[:2] == [
        "the adapter 'house' is published as version 1",
        "and its inputs are embedded",
    ]


def test_a_run_that_fails_says_why(bench):
    bench.go("fail")
    job = bench.create()
    bench.jobs.start()
    failed = bench.until(job, "failed")
    assert failed.error == f"{job.file}.jsonl: the loss is not finite at step 3"
    assert str(bench.path) not in repr(bench.jobs.events("ann", job.id))
    assert bench.published == []


def test_a_job_is_cancelled_while_it_waits_and_while_it_runs(bench):
    running, waiting = bench.create(), bench.create()
    bench.jobs.start()
    bench.until_started(running)
    assert bench.jobs.cancel("ann", waiting.id).status == "cancelled"
    assert bench.jobs.cancel("ann", running.id).status == "cancelled"
    last = bench.create()
    bench.go()
    bench.until(last, "succeeded")
    assert bench.jobs.job("ann", running.id).status == "cancelled"
    assert len(bench.published) == 1


def test_jobs_go_on_after_a_restart(bench):
    one, two = bench.create(), bench.create()
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
    job = bench.create()
    code = f"""
import sys, time
from veratune.serving.jobs.jobs import Jobs
from veratune.serving.jobs.models import TrainableModel
CHAT = TrainableModel("", "instruction", (("messages",), ("prompt", "completion")))
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
    bench = JobBench(tmp_path, max_jobs_per_tenant=1, max_files_per_tenant=3)
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
        jobs.create("ann", "base", wrong.id)
    with pytest.raises(ConfigError, match="'gpt' cannot be fine-tuned here; 'base' is wanted"):
        jobs.create("ann", "gpt", wrong.id)
    with pytest.raises(JobNotFoundError):
        jobs.create("ben", "base", wrong.id)
    job = bench.create()
    with pytest.raises(QueueFullError, match="1 jobs of this tenant are waiting"):
        bench.create()
    with pytest.raises(QueueFullError, match="3 files already"):
        jobs.add_file("ann", "x", "fine-tune", LINES)
    with pytest.raises(InUseError, match="an unfinished job uses file"):
        jobs.delete_file("ann", job.file)
    for name in ("job", "cancel", "events"):
        with pytest.raises(JobNotFoundError):
            getattr(jobs, name)("ben", job.id)
    jobs.cancel("ann", job.id)
    jobs.delete_file("ann", job.file)
    assert [file.id for file in jobs.files("ann")][-1] == wrong.id
    jobs.close()


def test_a_job_goes_on_after_errors_of_the_store(bench, caplog):
    """Writes fail for a while, as on a full disk: training goes on, and readiness tells."""
    job = bench.create()
    repository = bench.jobs.repository
    works, repository.set_progress = repository.set_progress, broken
    bench.jobs.start()
    bench.until_started(job)
    until(lambda: bench.jobs.problem() is not None)
    assert bench.jobs.problem() == "the job runner cannot store the progress of a job"
    repository.set_progress = works
    bench.go()
    assert bench.until(job, "succeeded").version == 1
    until(lambda: bench.jobs.problem() is None)
    assert "disk is full" in caplog.text


def test_the_job_runner_outlives_a_broken_store(bench, caplog):
    """The queue cannot be read for a while: the runner retries and says so."""
    repository = bench.jobs.repository
    works, repository.next_job = repository.next_job, broken
    bench.jobs.start()
    until(lambda: bench.jobs.problem() is not None)
    assert bench.jobs.problem() == "the job runner cannot store its jobs; it retries"
    bench.go()
    job = bench.create()
    repository.next_job = works
    bench.jobs.worker.wake()
    assert bench.until(job, "succeeded")
    until(lambda: bench.jobs.problem() is None)
    assert caplog.text.count("the job runner failed") >= 1


def test_an_adapter_that_cannot_be_stored_fails_its_job_and_no_other(bench):
    bench.publish_error = StoreError(f"{bench.path}/adapters.db: disk is full")
    bench.jobs.worker.max_delay = 0.05
    bench.go()
    one = bench.create()
    bench.jobs.start()
    failed = bench.until(one, "failed")
    assert failed.error == "the server could not run it: adapters.db: disk is full"
    bench.publish_error = None
    assert bench.until(bench.create(), "succeeded").version == 1


def test_an_adapter_that_does_not_fit_fails_its_job(bench):
    bench.publish_error = UnsupportedError("the adapter has rank 9,999")
    bench.go()
    job = bench.create()
    bench.jobs.start()
    assert "cannot be published: the adapter has rank 9,999" in bench.until(job, "failed").error


def test_a_job_runner_that_died_is_a_problem(bench):
    bench.jobs.start()
    assert bench.jobs.problem() is None
    bench.jobs.worker.close()
    assert bench.jobs.problem() == "the job runner has stopped"


def test_settings_are_checked_when_a_job_is_created(tmp_path):
    def refuse(model, settings):
        raise UnsupportedError(f"{model}: rank {settings['rank']} could not be served here")

    bench = JobBench(tmp_path, check_settings=refuse)
    with pytest.raises(UnsupportedError, match="base: rank 9 could not be served"):
        bench.create(settings={"rank": 9})
    assert bench.jobs.list_jobs("ann") == []
    bench.jobs.close()


def test_messages_name_files_without_the_servers_folders():
    assert without_paths("/srv/a b/x.jsonl: no") == "a b/x.jsonl: no"
    assert without_paths("see https://example.com/a/b and 3/4") == (
        "see https://example.com/a/b and 3/4"
    )
    assert without_paths("cannot open '/srv/jobs/run/adapter.bin'") == "cannot open 'adapter.bin'"


def broken(*words):
    raise StoreError("disk is full")


def until(met, seconds=20):
    end = time.time() + seconds
    while not met():
        assert time.time() < end
        time.sleep(0.02)


def test_the_openai_client_fine_tunes_and_asks_the_result(tmp_path):
    """A real run of `veratune train` on a tiny model, whose adapter then answers."""
    base = fakes.folder(small_llama(), tmp_path / "base")
    served = RunningServer(tmp_path, jobs={"base": TrainableModel(base, CHAT.task, CHAT.columns)})
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
            assert said[0] == "the adapter 'mine' is published as version 1"
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
