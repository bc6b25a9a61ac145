"""The comparison of accuracy per byte: its splits, its choice of rates, its tables."""

import dataclasses

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from veratune_lab.quality.experiment import Quality
from veratune_lab.quality.methods import CONTESTANTS
from veratune_lab.quality.protocol import (
    DEV,
    SCORED,
    TASKS,
    majority,
    pack,
    scores_of,
    task_of,
    unpack,
)
from veratune_lab.quality.report import document, final_score, finished, interval, page


@pytest.fixture
def folder(tmp_path):
    """A GLUE-like folder with 40 training and 12 validation rows."""
    for split, count in (("train", 40), ("validation", 12)):
        rows = Dataset.from_dict({
            "sentence1": [f"{split} {i}" for i in range(count)],
            "sentence2": ["same"] * count,
            "label": [float(i % 5) for i in range(count)],
        })  # fmt: skip
        rows.to_parquet(tmp_path / f"{split}.parquet")
    return str(tmp_path)


@pytest.mark.parametrize("first", [None, 20])
def test_held_out_rows_are_neither_trained_on_nor_scored(folder, first):
    protocol = dataclasses.replace(TASKS["stsb-1500"], first=first, dev=10, scored=8)
    task = task_of(protocol)
    train, dev, scored = (
        set(task.load_examples(folder, split)["sentence1"]) for split in ("train", DEV, SCORED)
    )
    assert len(train) == (20 if first else 30)
    assert len(dev) == 10
    assert scored == {f"validation {i}" for i in range(8)}
    assert not train & dev
    if first:
        assert train == {f"train {i}" for i in range(20)}
    assert set(task.load_examples(folder, DEV)["sentence1"]) == dev  # the same rows every time


def test_every_method_has_equally_many_trials_and_cells_have_names_of_their_own():
    assert {len(own.rates) for own in CONTESTANTS.values()} == {3}
    cells = Quality().cells("scaled")
    assert len({cell.name for cell in cells}) == len(cells) == 3 * len(CONTESTANTS) * len(TASKS)


@given(st.lists(st.floats(-5, 5), min_size=2, max_size=20))
def test_packed_numbers_come_back_to_a_hundredth(values):
    logits = np.array(values)[:, None]
    assert np.abs(unpack(pack(logits)) - np.array(values)).max() <= 0.00501


def test_packed_classes_come_back():
    assert unpack(pack(np.array([[0.0, 1.0], [2.0, 1.0]]))).tolist() == [1, 0]


def test_scores_and_constant_predictions():
    task = task_of(TASKS["mrpc"])
    task.labels = ["0", "1"]  # type: ignore[attr-defined]
    logits = np.array([[0.0, 1.0], [2.0, 1.0], [0.0, 3.0]])
    assert scores_of(task, logits, [1, 0, 0])["accuracy"] == pytest.approx(2 / 3)
    assert majority([1, 1, 0, 1], "accuracy") == 75.0
    assert majority([1, 1, 0, 1], "matthews") == 0.0


def test_an_interval_is_students():
    mean, low, high = interval([1.0, 2.0, 3.0])
    assert (mean, low, high) == pytest.approx((2.0, 2 - 2.4841, 2 + 2.4841), abs=1e-3)
    assert np.isnan(interval([1.0])[1])


def line(method, rate, seed, held_out, scored, task="stsb-1500"):
    group = f"{task}: {method}"
    return {
        "cell": f"{group}, lr {rate:g}", "group": group, "task": task, "method": method, "rate": rate,
        "seed": seed, "after": {"pearson": held_out}, "scored": {"pearson": scored}, "constant": 0.0,
        "trained": 2368, "bytes": 15772, "wall_seconds": 60.0, "device": "cpu", "machine": "test", "threads": 1,
        "torch": "2", "transformers": "5",
    }  # fmt: skip


def all_of(method, seeds, scored):
    """Three trials on seed 0, where the middle rate wins on held-out rows, and its other seeds."""
    low, middle, high = CONTESTANTS[method].rates
    out = [line(method, low, 0, 0.5, 0.99), line(method, high, 0, 0.6, 0.98)]
    return [*out, *(line(method, middle, seed, 0.7, scored + seed / 100) for seed in range(seeds))]


def test_the_rate_is_chosen_on_held_out_rows_and_unfinished_methods_are_left_out():
    ours, theirs = "principal d, r=64", "LoRA r=8, q,v"
    lines = [*all_of(ours, 3, 0.8), *all_of(theirs, 3, 0.7), line("IA3", 5e-3, 0, 0.9, 0.9)]
    cells = finished(Quality(), lines)
    assert set(cells) == {("stsb-1500", ours), ("stsb-1500", theirs)}
    assert [final_score(found) for found in cells["stsb-1500", ours]] == pytest.approx([80, 81, 82])
    text = page(Quality(), lines)
    assert "| principal d, r=64 | 2,368 | 15,772 | 81.0 ± 1.0 |" in text
    assert "| principal d, r=64 | +10.0 (+10.0 to +10.0) |" in text
    assert "Begun: IA3." in text
    assert "- MRPC: no method." in text


def test_an_empty_task_is_said_to_be_empty():
    lines = [found | {"constant": 81.0} for found in all_of("BitFit", 1, 0.8)]
    assert "the task is empty" in page(Quality(), lines)


def test_the_page_stands_without_any_line():
    text = document(Quality(), [], [], [])
    assert "No method has had all its trials yet." in text
