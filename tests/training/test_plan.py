import json

import pytest

import veratune as vt
from tests import fakes
from veratune.cli.plan_ import run
from veratune.errors import OutputError, UnsupportedError
from veratune.training.plan import plan
from veratune.training.run import train
from veratune.training.settings import TrainSettings

WORDS = ["turn", "the light on please", "off", "turn the light off please " * 2]


@pytest.fixture
def settings(tmp_path):
    rows = [{"prompt": WORDS[i % 4], "completion": WORDS[i % 3]} for i in range(20)]
    rows.append({"prompt": "turn " * 60, "completion": "on"})
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return TrainSettings(
        model=fakes.folder(fakes.llama(), tmp_path / "model"), task="instruction", data=str(tmp_path / "rows.jsonl"),
        eval_data=str(tmp_path / "rows.jsonl"), out="", batch_size=4, max_length=48, epochs=2, device="cpu",
    )  # fmt: skip


def test_a_plan_says_what_the_run_does(settings, tmp_path):
    shown = []
    found = plan(settings, vt.VeraConfig(rank=4), shown.append)
    assert found.examples == found.evaluation_examples == 20
    assert found.steps == 10
    assert found.tokens["max"] <= 48
    assert 0 < found.tokens["trained"] < found.tokens["all"]
    assert any("1 of 21 examples have more than max_length = 48" in note for note in found.notes)
    assert [on for _, on in shown[0]] == [False, True]
    assert min(found.train_seconds, found.evaluation_seconds, found.peak_memory) > 0
    with pytest.warns(UserWarning, match="1 of 21 examples"):
        done = train(
            TrainSettings(**settings.to_dict() | {"out": str(tmp_path / "run"), "preview": 0}),
            vt.VeraConfig(rank=4),
        )
    assert (done.steps, done.trained, done.bytes) == (
        found.steps,
        found.trained,
        found.adapter_bytes,
    )


def test_a_packed_plan_and_its_table(settings, capsys):
    words = [
        f"--{key.replace('_', '-')}={getattr(settings, key)}" for key in ("model", "task", "data")
    ]
    words += [
        "--batch-size=2",
        "--max-length=48",
        "--device=cpu",
        "--packing",
        "--rank=4",
        "--preview=0",
    ]
    assert run(words) == 0
    printed = capsys.readouterr().out
    assert "packed rows" in printed
    assert "note: 1 of 21 examples" in printed


def test_what_cannot_be_planned_is_refused(settings):
    used = TrainSettings(**settings.to_dict() | {"out": settings.model})
    with pytest.raises(OutputError, match="choose another or empty it"):
        plan(used, vt.VeraConfig())
    with pytest.raises(UnsupportedError, match="those of task 'grpo' are sampled from the model"):
        plan(TrainSettings(**settings.to_dict() | {"task": "grpo"}), vt.VeraConfig())
