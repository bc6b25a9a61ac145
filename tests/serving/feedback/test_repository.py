import pytest

from veratune.errors import JobNotFoundError, QueueFullError
from veratune.serving.feedback.models import FeedbackRun
from veratune.serving.feedback.repository import FeedbackRepository

TALK = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "Servus"}]


@pytest.fixture
def repository(tmp_path):
    opened = FeedbackRepository(tmp_path / "feedback.db", max_per_tenant=12)
    yield opened
    opened.close()


def test_every_fifth_usable_example_of_an_adapter_is_held_out(repository):
    held_out = []
    for i in range(12):
        kind = "down" if i == 1 else "up"
        held_out.append(repository.add("ann", "personal", kind, TALK).held_out)
    assert [i for i, held in enumerate(held_out) if held] == [5, 10]
    with pytest.raises(QueueFullError, match="12 feedback examples"):
        repository.add("ann", "personal", "up", TALK)


def test_what_is_due_counts_new_usable_examples(repository):
    for _ in range(5):
        repository.add("ann", "personal", "correction", TALK)
        repository.add("ben", "personal", "down", TALK)
    (due,) = repository.due(5)
    assert (due.tenant, due.adapter, due.new) == ("ann", "personal", 5)
    assert repository.due(6) == []
    examples = repository.usable("ann", "personal", 3)
    assert len(examples) == 3
    repository.finish(FeedbackRun("ann", "personal", 1.0, "rejected"), examples)
    assert repository.due(2)[0].new == 2
    assert [run.outcome for run in repository.runs("ann")] == ["rejected"]


def test_pages_and_single_deletions(repository):
    first, second, third = (repository.add("ann", "x", "up", TALK) for _ in range(3))
    assert [e.id for e in repository.examples("ann", limit=2)] == [third.id, second.id]
    assert [e.id for e in repository.examples("ann", second.id)] == [first.id]
    assert repository.examples("ann", "unknown") == []
    assert repository.has("ann", [first, second])
    with pytest.raises(JobNotFoundError):
        repository.delete("ben", first.id)
    repository.delete("ann", first.id)
    assert not repository.has("ann", [first, second])


def test_a_deleted_tenant_leaves_no_bytes(repository, tmp_path):
    secret = [TALK[0], {"role": "assistant", "content": "xyzzy-secret" * 50}]
    for _ in range(3):
        repository.add("ann", "personal", "up", secret)
    repository.add("ben", "personal", "up", TALK)
    assert repository.delete_tenant("ann") == 3
    for path in tmp_path.iterdir():
        assert b"xyzzy" not in path.read_bytes(), path
    assert repository.examples("ann") == []
    assert len(repository.examples("ben")) == 1
