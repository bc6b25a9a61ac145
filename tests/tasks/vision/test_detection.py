import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import veratune as vt
from tests import fakes
from veratune.errors import DataError
from veratune.formats import native
from veratune.inference.adapted import load_with_adapter
from veratune.inference.evaluate import evaluate
from veratune.tasks.vision.boxes import load_box_examples, validate_boxes
from veratune.tasks.vision.detection import mean_average_precision
from veratune.training.run import train
from veratune.training.settings import TrainSettings

BOXES = {0: [[2.0, 4.0, 12.0, 20.0]], 1: [[10.0, 6.0, 30.0, 16.0], [0.0, 0.0, 8.0, 8.0]]}
NAMES = {0: ["cat"], 1: ["dog", "cat"]}


def images(folder):
    folder.mkdir(parents=True)
    for i in BOXES:
        values = np.full((24, 32, 3), 40, np.uint8)
        for (x0, y0, x1, y1), name in zip(BOXES[i], NAMES[i], strict=True):
            values[int(y0) : int(y1), int(x0) : int(x1)] = (
                (220, 30, 30) if name == "cat" else (30, 220, 30)
            )
        Image.fromarray(values).save(folder / f"{i}.png")


def coco(folder):
    images(folder / "train")
    notes = [
        {
            "image_id": i,
            "bbox": [x0, y0, x1 - x0, y1 - y0],
            "category_id": 5 if name == "cat" else 9,
            "iscrowd": 0,
        }
        for i in BOXES
        for (x0, y0, x1, y1), name in zip(BOXES[i], NAMES[i], strict=True)
    ]
    (folder / "annotations").mkdir()
    stored = {
        "images": [{"id": i, "file_name": f"{i}.png"} for i in BOXES], "annotations": notes,
        "categories": [{"id": 5, "name": "cat"}, {"id": 9, "name": "dog"}],
    }  # fmt: skip
    (folder / "annotations" / "instances_train.json").write_text(json.dumps(stored))
    return folder


def voc(folder):
    images(folder / "JPEGImages")
    (folder / "Annotations").mkdir()
    (folder / "ImageSets" / "Main").mkdir(parents=True)
    (folder / "ImageSets" / "Main" / "train.txt").write_text("0\n1\n")
    for i in BOXES:
        objects = "".join(
            f"<object><name>{name}</name><bndbox><xmin>{x0 + 1}</xmin><ymin>{y0 + 1}</ymin><xmax>{x1}</xmax><ymax>{y1}</ymax></bndbox></object>"
            for (x0, y0, x1, y1), name in zip(BOXES[i], NAMES[i], strict=True)
        )
        (folder / "Annotations" / f"{i}.xml").write_text(
            f"<annotation><filename>{i}.png</filename>{objects}</annotation>"
        )
    return folder


@pytest.mark.parametrize("form", [coco, voc])
def test_both_forms_give_the_same_rows(tmp_path, form):
    rows = load_box_examples(str(form(tmp_path / "data")))
    assert rows["boxes"] == list(BOXES.values())
    assert rows["labels"] == list(NAMES.values())


def test_damaged_annotations_are_named(tmp_path):
    data = coco(tmp_path / "data")
    (data / "train" / "1.png").unlink()
    with pytest.raises(DataError, match="it names the image '1.png', which is in none of"):
        load_box_examples(str(data))
    (data / "annotations" / "instances_train.json").write_text('{"images": []}')
    with pytest.raises(DataError, match="instances_train.json: not COCO annotations"):
        load_box_examples(str(data))
    other = voc(tmp_path / "voc")
    (other / "Annotations" / "1.xml").write_text("<annotation><object/></annotation>")
    with pytest.raises(DataError, match="1.xml: not VOC annotations"):
        load_box_examples(str(other))


def test_numbered_classes_have_names_beside_them_and_objects_are_understood(tmp_path):
    from datasets import Dataset

    Image.new("RGB", (9, 9)).save(tmp_path / "x.png")
    rows = {"image": ["x.png"], "boxes": [[[0.0, 0.0, 4.0, 4.0]]], "labels": [[1]]}
    Dataset.from_dict(rows).to_parquet(tmp_path / "train.parquet")
    (tmp_path / "labels.json").write_text('{"0": "cat", "1": "dog"}')
    assert load_box_examples(str(tmp_path))["labels"] == [["dog"]]
    objects = {"image": ["x.png"], "objects": [{"bbox": [[1.0, 1.0, 3.0, 4.0]], "category": [7]}]}
    (tmp_path / "o").mkdir()
    Dataset.from_dict(objects).to_parquet(tmp_path / "o" / "train.parquet")
    rows = load_box_examples(str(tmp_path / "o"))
    assert (rows["boxes"], rows["labels"]) == ([[[1.0, 1.0, 4.0, 5.0]]], [["7"]])


def test_boxes_outside_their_image_fail_or_are_cut():
    inside, over, empty = [1.0, 1.0, 5.0, 5.0], [6.0, 6.0, 14.0, 9.0], [3.0, 3.0, 3.0, 8.0]
    with pytest.raises(
        DataError,
        match=r"row 4: the image is 10 x 8 and the box \[6.0, 6.0, 14.0, 9.0\] lies outside it.*clip",
    ):
        validate_boxes([inside, over], ["a", "b"], 10, 8, 4)
    with pytest.raises(DataError, match="is empty"):
        validate_boxes([empty], ["a"], 10, 8, 0)
    assert validate_boxes([inside, over, empty], ["a", "b", "c"], 10, 8, 0, "clip") == (
        [inside, [6.0, 6.0, 10.0, 8.0]],
        ["a", "b"],
    )
    assert validate_boxes([[-0.5, 0.0, 10.9, 8.0]], ["a"], 10, 8, 0) == (
        [[0.0, 0.0, 10.0, 8.0]],
        ["a"],
    )  # a pixel of slack
    with pytest.raises(DataError, match="is no box"):
        validate_boxes([[1.0, 2.0, 3.0]], ["a"], 10, 8, 0)
    with pytest.raises(DataError, match="1 boxes and 2 labels"):
        validate_boxes([inside], ["a", "b"], 10, 8, 0)


@given(
    st.lists(
        st.tuples(st.integers(0, 40), st.integers(0, 40), st.integers(5, 40), st.integers(5, 40)),
        min_size=1,
        max_size=4,
        unique=True,
    )
)
def test_what_is_found_exactly_scores_one_and_anything_else_less(places):
    boxes = np.array([[x, y, x + w, y + h] for x, y, w, h in places], float)
    kinds = np.arange(len(boxes)) % 2
    exact = {"boxes": boxes, "labels": kinds, "scores": np.linspace(0.9, 0.5, len(boxes))}
    assert mean_average_precision([(boxes, kinds)], [exact], ["a", "b"])["map"] == pytest.approx(
        1.0
    )
    off = exact | {
        "boxes": boxes + np.array([0.4, 0, 0.4, 0]) * (boxes[:, 2:3] - boxes[:, :1])
    }  # IoU 0.43 each
    wrong = exact | {"labels": 1 - kinds}
    if len(boxes) == 1:
        assert mean_average_precision([(boxes, kinds)], [wrong], ["a", "b"])["map"] == 0.0
        assert mean_average_precision([(boxes, kinds)], [off], ["a", "b"])["map"] == 0.0
    nothing = {"boxes": np.zeros((0, 4)), "labels": np.zeros(0), "scores": np.zeros(0)}
    assert mean_average_precision([(boxes, kinds)], [nothing], ["a", "b"])["map"] == 0.0


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("kind", "targets"),
    [
        ("yolos", ["query", "value"]),
        ("detr", ["query", "value"]),
        ("rt-detr", ["*.backbone.*.convolution"]),
    ],
)
def test_a_detector_is_trained_scored_and_drawn(tmp_path, kind, targets):
    data, model = coco(tmp_path / "data"), fakes.detector(tmp_path / kind, kind)
    run = TrainSettings(
        model=model, task="object-detection", data=str(data), eval_data=str(data), eval_split="train", out=str(tmp_path / "run"), lr=1e-2,
        head_lr=5e-3, batch_size=2, epochs=12, device="cpu", augment="flip", preview=1, save_steps=100, keep="last",
    )  # fmt: skip
    shown = []
    result = train(run, vt.VeraConfig(rank=8, targets=targets), on_preview=shown.append)
    assert shown[0][1][1]
    assert result.after["loss"] < result.before["loss"]
    assert {"map", "map_50", "map_75", "recall"} <= set(result.after)
    assert Image.open(tmp_path / "run" / "boxes.png").height > 400
    adapter = native.read(result.path)
    assert adapter.task["labels"] == ["cat", "dog"]
    assert any("class" in name for name in adapter.head)  # other classes than the checkpoint's
    loaded = load_with_adapter(model, result.path, device="cpu")
    again = evaluate(loaded, str(data), split="train", batch_size=2)
    assert again["loss"] == pytest.approx(result.after["loss"], rel=1e-4)
    assert again["map"] == pytest.approx(result.after["map"], abs=1e-6)
