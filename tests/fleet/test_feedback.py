"""Training on feedback: one fleet, a gate on held-out examples, new versions in the store."""

import pytest

import veratune as vt
from tests import fakes
from veratune.errors import ConfigError
from veratune.fleet.feedback import summary, train_on_feedback
from veratune.formats import native
from veratune.serving.feedback.repository import FeedbackRepository
from veratune.serving.store.sqlite import SqliteStore
from veratune.training.fleet.settings import FleetSettings
from veratune.training.settings import TrainSettings

pytestmark = pytest.mark.filterwarnings("ignore")


class Bench:
    def __init__(self, path):
        self.path, self.runs = path, 0
        fakes.folder(fakes.llama(num_hidden_layers=2), path / "llama")
        self.repository = FeedbackRepository(path / "feedback.db")
        self.store = SqliteStore(path / "store.db")

    def correct(self, tenant, count, word="light", adapter="personal"):
        for i in range(count):
            talk = [
                {"role": "user", "content": f"turn on {i}"},
                {"role": "assistant", "content": word},
            ]
            self.repository.add(tenant, adapter, "correction", talk)

    def train(self, rank=4, min_examples=5, **settings):
        self.runs += 1
        common = {"lr": 5e-2, "batch_size": 4, "epochs": 2, "device": "cpu", **settings}
        return train_on_feedback(
            self.repository,
            self.store,
            TrainSettings(
                model=str(self.path / "llama"),
                task="instruction",
                data="",
                out=str(self.path / f"run{self.runs}"),
                **common,
            ),
            vt.VeraConfig(rank=rank),
            FleetSettings(),
            min_examples,
        )

    def close(self):
        self.repository.close()
        self.store.close()


@pytest.fixture
def bench(tmp_path):
    made = Bench(tmp_path)
    yield made
    made.close()


def test_tenants_with_enough_feedback_get_a_version_and_go_on_from_it(bench):
    bench.correct("ann", 5)
    bench.correct("ben.b", 6, "please", adapter="a.name-that_no.fleet.takes")
    bench.correct("cy", 4)
    outcomes = bench.train()
    assert summary(outcomes) == {"published": 2, "rejected": 0, "refused": 0}
    assert all(run.after < run.before and run.version == 1 for run in outcomes)
    assert bench.train() == []
    first = native.decode(bench.store.get("ann", "personal", 1))
    bench.correct("ann", 5)
    (again,) = bench.train(lr=1e-3)
    assert again.version == 2
    second = native.decode(bench.store.get("ann", "personal", 2))
    assert again.before < outcomes[0].before  # it went on from version 1
    assert all((first.d[k] - v).abs().max() < 0.05 for k, v in second.d.items())


def test_a_candidate_that_is_no_better_is_rejected(bench):
    bench.correct("ann", 5)
    (run,) = bench.train(lr=1e-30)
    assert run.outcome == "rejected"
    assert "is not below" in run.reason
    with pytest.raises(LookupError):
        bench.store.newest("ann", "personal")
    assert bench.train() == []  # its examples are not new any more


def test_a_stored_adapter_of_another_rank_is_refused_with_the_reason(bench):
    bench.correct("ann", 5)
    bench.train()
    bench.correct("ann", 5)
    (run,) = bench.train(rank=6)
    assert run.outcome == "refused"
    assert "other layers or another basis" in run.reason


def test_deleted_examples_are_not_published(bench, monkeypatch):
    bench.correct("ann", 5)
    put = bench.store.put

    def deleting(*args):
        bench.repository.delete_tenant("ann")
        return put(*args)

    monkeypatch.setattr(bench.store, "put", deleting)
    (run,) = bench.train()
    assert run.reason == "its examples were deleted meanwhile"
    with pytest.raises(LookupError):
        bench.store.newest("ann", "personal")


def test_fewer_examples_than_one_held_out_are_refused(bench):
    with pytest.raises(ConfigError, match="at least 5"):
        bench.train(min_examples=4)
