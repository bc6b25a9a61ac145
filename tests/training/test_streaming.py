"""Streaming: examples that are encoded as they are read are those of the whole data set."""

import itertools
import json

import pytest

import veratune as vt
from tests import fakes
from veratune.errors import ConfigError, DataError, UnsupportedError
from veratune.tasks.data import stream_examples
from veratune.tasks.text.language import CausalLM, Instruction
from veratune.training.plan import plan
from veratune.training.run import train
from veratune.training.settings import TrainSettings

pytestmark = pytest.mark.filterwarnings("ignore")
ROWS = [
    {"prompt": f"turn the light {x}", "completion": f"light {x}" * (1 + i % 3)}
    for i, x in enumerate(["on", "off", "good", "bad"] * 8)
]


def write(folder, rows=ROWS, name="train"):
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def settings(folder, **more):
    options = {
        "model": str(folder / "model"), "task": "instruction", "data": str(folder), "out": str(folder / "run"), "lr": 0.1,
        "batch_size": 4, "max_steps": 6, "device": "cpu", "preview": 0, "streaming": True,
    }  # fmt: skip
    return TrainSettings(**options | more)


def plain(rows):
    return [{key: list(row[key]) for key in ("input_ids", "attention_mask", "labels")} for row in rows]  # fmt: skip


def test_conversations_are_those_of_the_whole_data_set(tmp_path):
    path, task, tokenizer = str(write(tmp_path)), Instruction(), fakes.tokenizer()
    streamed = task.encode_stream(stream_examples(path), tokenizer)
    assert plain(streamed) == plain(task.encode(task.load_examples(path), tokenizer))


def test_an_empty_answer_is_reported_and_no_other_column_reaches_the_model(tmp_path):
    path, task = str(write(tmp_path, [*ROWS[:3], ROWS[0] | {"completion": ""}])), Instruction()
    streamed = task.encode_stream(stream_examples(path), fakes.tokenizer())
    with pytest.warns(UserWarning, match="trains on an empty answer, the first is row 3"):
        rows = list(streamed)
    assert [set(row) for row in rows] == [{"input_ids", "attention_mask", "labels"}] * 4


def test_blocks_are_those_of_the_whole_text(tmp_path):
    path = str(write(tmp_path, [{"text": row["prompt"]} for row in ROWS]))
    task, tokenizer = CausalLM(max_length=7), fakes.tokenizer()
    whole = task.encode(task.load_examples(path), tokenizer)
    streamed = task.encode_stream(stream_examples(path), tokenizer)
    full = [row for row in plain(whole) if len(row["labels"]) == 7]
    assert plain(itertools.islice(streamed, len(full))) == full
    # What is left over begins the first block of the next pass.
    rest = list(itertools.chain(*whole["input_ids"]))[len(full) * 7 :]
    (first,) = plain(itertools.islice(streamed, 1))
    assert first["input_ids"][: len(rest)] == rest


@pytest.mark.parametrize("task", ["instruction", "causal-lm"])
def test_a_run_learns_from_a_stream(task, tmp_path):
    fakes.folder(fakes.llama(), tmp_path / "model")
    rows = ROWS if task == "instruction" else [{"text": row["prompt"]} for row in ROWS]
    write(tmp_path, rows)
    write(tmp_path, rows[:4], "validation")
    result = train(settings(tmp_path, task=task, max_length=32), vt.VeraConfig(rank=16))
    assert result.steps == 6
    assert result.after["loss"] < result.before["loss"]


def test_long_rows_are_reported_as_they_come(tmp_path):
    long = {"prompt": "light", "completion": "on " * 40}
    path, tokenizer = str(write(tmp_path, [ROWS[0], long, ROWS[1]])), fakes.tokenizer()
    with pytest.warns(UserWarning, match="1 of 2 examples so far .* were dropped"):
        kept = list(Instruction(max_length=30).encode_stream(stream_examples(path), tokenizer))
    assert len(kept) == 2
    with pytest.raises(DataError, match="row 1: .* tokens, more than max_length = 30"):
        list(Instruction(max_length=30, on_overflow="fail").encode_stream(stream_examples(path), tokenizer))  # fmt: skip
    cut = Instruction(max_length=60, on_overflow="truncate")
    assert [len(row["input_ids"]) <= 60 for row in cut.encode_stream(stream_examples(path), tokenizer)] == [True] * 3  # fmt: skip


@pytest.mark.parametrize(
    ("more", "problem"),
    [
        ({"max_steps": 0}, "say with max_steps how long to train"),
        ({"packing": True}, "packing needs the whole data set"),
        ({"group_by_length": True}, "group_by_length needs the whole data set"),
        ({"find_lr": True}, "find_lr needs the whole data set"),
        ({"num_workers": 2}, "a stream is read by one process"),
    ],
)
def test_what_needs_the_whole_data_set_is_refused(more, problem, tmp_path):
    with pytest.raises(ConfigError, match=problem):
        settings(tmp_path, **more)


def test_other_tasks_and_plans_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="task 'seq2seq' reads its data whole"):
        train(settings(tmp_path, task="seq2seq"), vt.VeraConfig(rank=4))
    with pytest.raises(UnsupportedError, match="plan without it"):
        plan(settings(tmp_path), vt.VeraConfig(rank=4))


def test_a_stream_without_an_example_is_refused(tmp_path):
    fakes.folder(fakes.llama(), tmp_path / "model")
    write(tmp_path)
    with pytest.raises(DataError, match="no example is left within max_length"):
        train(settings(tmp_path, max_length=2), vt.VeraConfig(rank=4))
    (tmp_path / "train.jsonl").write_text('{"prompt": "light", "completion": "on"}\n{"prompt": 3\n')
    with pytest.raises(DataError, match="cannot be read"):
        train(settings(tmp_path), vt.VeraConfig(rank=4))
