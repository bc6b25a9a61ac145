"""FeedbackTrainer tells which adapters a run has published."""

import sys
import time

import pytest

from veratune.serving.feedback.models import FeedbackRun
from veratune.serving.feedback.repository import FeedbackRepository
from veratune.serving.feedback.trainer import FeedbackTrainer

TALK = [{"role": "user", "content": "light"}, {"role": "assistant", "content": "on"}]

# Stands for `veratune train-feedback`: says which adapters it has published and rejected.
TRAINER = """
import sys, time
from veratune.serving.feedback.models import FeedbackRun
from veratune.serving.feedback.repository import FeedbackRepository
repository = FeedbackRepository(sys.argv[sys.argv.index("--feedback") + 1])
for due in repository.due(1):
    outcome = "published" if due.adapter == "good" else "rejected"
    run = FeedbackRun(due.tenant, due.adapter, time.time(), outcome, 1.0, 0.5, 1)
    repository.finish(run, repository.usable(due.tenant, due.adapter, 10))
"""


@pytest.fixture
def repository(tmp_path):
    made = FeedbackRepository(tmp_path / "feedback.db")
    yield made
    made.close()


def test_new_versions_are_told_with_their_examples(repository, tmp_path):
    (tmp_path / "trainer.py").write_text(TRAINER)
    for adapter in ("good", "bad", "good"):
        repository.add("ann", adapter, "correction", TALK)
    old = repository.add("ann", "old", "correction", TALK)
    published = FeedbackRun("ann", "old", time.time() - 60, "published", 1.0, 0.5, 1)
    repository.finish(published, [old])
    told = []
    trainer = FeedbackTrainer(
        repository,
        tmp_path / "runs",
        {"feedback": str(repository.path)},
        1,
        (sys.executable, str(tmp_path / "trainer.py")),
        on_published=lambda *values: told.append(values),
    )
    trainer.start()
    try:
        end = time.time() + 60
        while not told and time.time() < end:
            time.sleep(0.05)
    finally:
        trainer.close()
    ((tenant, adapter, examples),) = told
    assert (tenant, adapter) == ("ann", "good")
    assert [example.messages for example in examples] == [TALK, TALK]
    assert not repository.due(1)
