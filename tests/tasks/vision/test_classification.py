import io
import json

import pytest
import torch
from datasets import Dataset
from PIL import Image

import veratune as vt
from tests import fakes
from veratune.errors import ConfigError, DataError
from veratune.formats import native
from veratune.inference.adapted import load_with_adapter
from veratune.inference.evaluate import evaluate_with_base
from veratune.training.run import train
from veratune.training.settings import TrainSettings

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    out = tmp_path_factory.mktemp("images")
    fakes.image_folder(out / "data", {"train": 24, "validation": 12})
    fakes.image_model(out / "vit")
    fakes.image_model(out / "resnet", "resnet")
    return out


def settings(place, out, **changes):
    base = {
        "model": str(place / "vit"), "task": "image-classification", "data": str(place / "data"), "out": str(out), "lr": 2e-2,
        "head_lr": 1e-2, "batch_size": 8, "epochs": 4, "device": "cpu", "preview": 0,
    }  # fmt: skip
    return TrainSettings(**(base | changes))


def test_a_folder_of_classes_is_learned_and_scored_again(place, tmp_path):
    shown = []
    vera = vt.VeraConfig(rank=16, targets=["all-linear"])
    result = train(
        settings(place, tmp_path / "run", preview=1, lr=5e-2, epochs=16),
        vera,
        on_preview=shown.append,
    )
    assert result.after["accuracy"] >= 0.9 > 0.6 > result.before["accuracy"]
    assert shown[0][0] == ("an image of 16 x 16 pixels", False)
    assert Image.open(tmp_path / "run" / "confusion.png").size[0] > 100
    adapter = native.read(result.path)
    assert adapter.task == {
        "name": "image-classification",
        "columns": {},
        "image_size": None,
        "labels": ["above", "below"],
    }
    base, after = evaluate_with_base(
        load_with_adapter(str(place / "vit"), result.path, device="cpu"), str(place / "data")
    )
    assert after["accuracy"] == result.after["accuracy"] > base["accuracy"]


def test_another_size_of_images_is_interpolated(place, tmp_path):
    result = train(
        settings(place, tmp_path / "run", image_size=24, augment="flip", epochs=1),
        vt.VeraConfig(rank=8),
    )
    loaded = load_with_adapter(str(place / "vit"), result.path, device="cpu")
    assert loaded.processor.size["height"] == 24
    assert result.steps == 3


@pytest.mark.parametrize("policy", ["frozen", "train"])
def test_batch_normalisation_is_frozen_or_stored(place, tmp_path, policy):
    result = train(
        settings(
            place,
            tmp_path / "run",
            model=str(place / "resnet"),
            batch_norm=policy,
            epochs=2,
            keep="last",
        ),
        vt.VeraConfig(rank=8, targets=["all-conv"]),
    )
    adapter = native.read(result.path)
    stored = [name for name in adapter.head if name.endswith("running_mean")]
    assert bool(stored) == (policy == "train")
    # A model that is loaded computes what the trained one did, statistics included.
    loaded = load_with_adapter(str(place / "resnet"), result.path, device="cpu")
    _, after = evaluate_with_base(loaded, str(place / "data"))
    assert after["loss"] == pytest.approx(result.after["loss"], rel=1e-5)
    vt.use(loaded.model, None)
    means = [
        m.running_mean
        for n, m in loaded.model.named_modules()
        if isinstance(m, torch.nn.BatchNorm2d) and ".vera." not in n
    ]
    assert all(not mean.any() for mean in means)  # the base model's own are as they came


def test_mistakes_name_what_was_found(place, tmp_path):
    vera = vt.VeraConfig(rank=8)
    with pytest.raises(
        ConfigError,
        match="batch_norm is 'frozen', but ViTForImageClassification has no batch normalisation",
    ):
        train(settings(place, tmp_path / "a", batch_norm="frozen"), vera)
    with pytest.raises(
        ConfigError, match="max_length is set, but task 'image-classification' does not take it"
    ):
        train(settings(place, tmp_path / "b", max_length=16), vera)
    with pytest.raises(ConfigError, match="image_size is 0; it must be at least 1 pixel"):
        train(settings(place, tmp_path / "c", image_size=0), vera)
    other = fakes.image_folder(tmp_path / "other", {"validation": 4})
    (other / "validation" / "above").rename(other / "validation" / "beside")
    with pytest.raises(DataError, match="label 'beside' in column 'label' is none of above, below"):
        train(settings(place, tmp_path / "d", eval_data=str(other)), vera)
    assert not any((tmp_path / name).exists() for name in "abcd")
    with pytest.raises(ConfigError, match="image-classification needs the label names"):
        load_with_adapter(str(place / "vit"), None, task="image-classification")


def test_encoded_images_in_a_file_with_numbered_classes(place, tmp_path):
    rows = fakes.image_rows(16)

    def stored(image):
        out = io.BytesIO()
        image.save(out, "PNG")
        return out.getvalue()

    data = {
        "image": [stored(i) for i, _ in rows],
        "label": [3 if name == "above" else 1 for _, name in rows],
    }
    Dataset.from_dict(data).to_parquet(tmp_path / "train.parquet")
    result = train(
        settings(place, tmp_path / "run", data=str(tmp_path / "train.parquet"), epochs=1),
        vt.VeraConfig(rank=8),
    )
    assert native.read(result.path).task["labels"] == ["0", "1", "2", "3"]
    assert json.loads((tmp_path / "run" / "results.json").read_text())["head"] == 4 * 32 + 4
