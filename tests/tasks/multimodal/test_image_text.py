"""Vision-language models: rows with images, the loss mask, and from rows to an adapter that sees."""

import base64
import io
import json

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image, List, Value
from PIL import Image as pil

import veratune as vt
from tests import fakes
from tests.tasks.multimodal import models
from veratune.errors import DataError, UnsupportedError
from veratune.formats import native
from veratune.inference.adapted import load_with_adapter
from veratune.inference.evaluate import evaluate
from veratune.inference.multimodal import generate_with_images
from veratune.tasks.multimodal import image_encoding
from veratune.tasks.multimodal.image_text import ImageTextToText
from veratune.tasks.text.language import IGNORED
from veratune.training.fleet.losses import row_losses_of
from veratune.training.run import train
from veratune.training.settings import TrainSettings

pytestmark = pytest.mark.filterwarnings("ignore")


def picture(red: int = 200, side: int = 16) -> bytes:
    out = io.BytesIO()
    pil.fromarray(np.full((side, side, 3), (red, 0, 0), np.uint8)).save(out, "PNG")
    return out.getvalue()


def parts(text: str, *images) -> dict:
    shown = [{"type": "image", "image": image} for image in images]
    return {"role": "user", "content": [*shown, {"type": "text", "text": text}]}


def reply(text: str) -> dict:
    return {"role": "assistant", "content": text}


def row_file(folder, rows, name="train"):
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module", params=models.VISION_LANGUAGE)
def made(request):
    return models.VISION_LANGUAGE[request.param]()


@pytest.fixture(scope="module")
def llava():
    return models.llava()


@pytest.fixture
def task(llava):
    """A task whose templates are those of the tiny model, and its processor."""
    out, processor = ImageTextToText(max_length=200), llava[1]
    processor.tokenizer.chat_template = processor.chat_template
    return out, processor


def encode(task, rows, folder):
    out, processor = task
    return out.encode(out.load_examples(str(row_file(folder, rows))), processor)


def trained_text(encoded, processor):
    labels = [label for label in encoded["labels"] if label != IGNORED]
    return processor.tokenizer.decode(labels)


def test_a_batch_gives_each_row_the_loss_that_it_has_alone(made, tmp_path):
    """Rows of one image, of two and of two turns with an image each, in one padded batch."""
    model, processor = made
    processor.tokenizer.chat_template = processor.chat_template
    for name, red in (("a", 250), ("b", 10)):
        (tmp_path / f"{name}.png").write_bytes(picture(red, 16 if name == "a" else 24))
    task = ImageTextToText()
    rows = [
        {"messages": [parts("light", "a.png"), reply("on")]},
        {"messages": [parts("which is bad", "a.png", "b.png"), reply("great light")]},
        {"messages": [parts("light", "b.png"), reply("off"), parts("film", "a.png"), reply("love")]},
    ]  # fmt: skip
    encoded = encode((task, processor), rows, tmp_path)
    texts = [trained_text(row, processor) for row in encoded]
    assert texts == ["on</s>", "great light</s>", "off</s>love</s>"]
    collate = task.collator(processor)
    alone = []
    with torch.no_grad():
        for row in encoded:
            count = sum(label != IGNORED for label in row["labels"])
            alone.append((model(**collate([row])).loss * count, count))
        batch = model(**collate(list(encoded))).loss
    total = sum(loss for loss, _ in alone) / sum(count for _, count in alone)
    torch.testing.assert_close(batch, total, rtol=1e-4, atol=1e-4)
    # The image is seen: with another one in its place the loss is another.
    (tmp_path / "a.png").write_bytes(picture(0))
    with torch.no_grad():
        other = model(**collate([encoded[0]])).loss
    assert abs(other - alone[0][0] / alone[0][1]) > 1e-5


@pytest.mark.parametrize(
    "name",
    [
        name if name == "smolvlm" else pytest.param(name, marks=pytest.mark.slow)
        for name in models.VISION_LANGUAGE
    ],
)
def test_a_model_learns_saves_loads_and_describes(name, tmp_path):
    base = models.folder(name, tmp_path / "model")
    rows = []
    for i, (image, label) in enumerate(fakes.image_rows(8)):
        image.save(tmp_path / f"{i}.png")
        rows.append({"image": f"{i}.png", "caption": label})
    for split in ("train", "validation"):
        row_file(tmp_path, rows, split)
    result = train(
        TrainSettings(
            model=base, task="image-text-to-text", data=str(tmp_path), out=str(tmp_path / "run"), prompt="where is it?",
            lr=0.1, batch_size=8, epochs=12, device="cpu", preview=0, keep="last", save_steps=100,
        ),
        vt.VeraConfig(rank=32, targets="all-linear" if name == "gemma3" else None),
    )  # fmt: skip
    assert result.after["loss"] < 0.9 * result.before["loss"]
    stored = native.read(result.path)
    assert stored.task["name"] == "image-text-to-text"
    if name != "gemma3":  # the default is the language tower alone
        assert not any("vision" in layer or "visual" in layer for layer in stored.shapes)
    loaded = load_with_adapter(base, result.path, device="cpu")
    scores = evaluate(loaded, str(tmp_path), generate=True, max_new_tokens=4, batch_size=3)
    assert scores["loss"] == pytest.approx(result.after["loss"], rel=1e-3)
    assert 0 <= scores["exact_match"] <= 1


def test_generation_pads_on_the_left(made):
    """A short prompt in a batch beside a long one is completed as it is alone."""
    model, processor = made
    processor.tokenizer.chat_template = processor.chat_template
    image = {"bytes": picture(), "path": None}
    prompts = [
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]
        for text in ("light", "turn the light in the kitchen off please")
    ]
    together = list(
        generate_with_images(model, processor, prompts, [[image]] * 2, max_new_tokens=6)
    )
    alone = [next(generate_with_images(model, processor, [p], [[image]], max_new_tokens=6)) for p in prompts]  # fmt: skip
    assert together == alone


def test_every_form_of_a_row_gives_the_same_example(task, tmp_path):
    (tmp_path / "a.png").write_bytes(picture())
    url = "data:image/png;base64," + base64.b64encode(picture()).decode()
    asked = {"role": "user", "content": "<image>light"}
    text = {"type": "text", "text": "light"}
    forms = [
        {"messages": [parts("light", "a.png"), reply("on")]},
        {"messages": [parts("light", url), reply("on")]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}, text]}, reply("on")]},
        {"messages": [{"role": "user", "content": [{"type": "image"}, text]}, reply("on")], "images": ["a.png"]},
        {"messages": [asked, reply("on")], "image": "a.png"},
        {"messages": [{"role": "user", "content": "light"}, reply("on")], "image": "a.png"},
        {"conversations": [{"from": "human", "value": "<image>light"}, {"from": "gpt", "value": "on"}], "image": "a.png"},
        {"prompt": "light", "completion": "on", "image": "a.png"},
    ]  # fmt: skip
    wanted, collate = None, task[0].collator(task[1])
    for row in forms:
        (encoded,) = encode(task, [row], tmp_path)
        batch = {key: value.tolist() for key, value in collate([encoded]).items()}
        wanted = wanted or batch
        assert batch == wanted, row
    out = ImageTextToText(prompt="light")
    features = Features({"image": Image(), "caption": Value("string")})
    stored = {"image": [{"bytes": picture(), "path": None}], "caption": ["on"]}
    Dataset.from_dict(stored, features=features).to_parquet(tmp_path / "train.parquet")
    examples = out.load_examples(str(tmp_path / "train.parquet"))
    (encoded,) = out.encode(examples, task[1])
    assert {key: value.tolist() for key, value in collate([encoded]).items()} == wanted


def test_lists_of_encoded_images_stay_encoded_when_loaded(tmp_path):
    features = Features({"images": List(Image()), "prompt": Value("string")})
    rows = {"images": [[{"bytes": picture(), "path": None}] * 2], "prompt": ["light"]}
    Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "train.parquet")
    loaded = ImageTextToText().load_examples(str(tmp_path / "train.parquet"))
    assert loaded.features["images"].feature == Image(decode=False)


def messages_with(image=None, text="light", answer="on"):
    shown = [parts(text, image)] if image is not None else [{"role": "user", "content": text}]
    return {"messages": [*shown, reply(answer)]}


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        (messages_with(), "row 1, column 'messages': no image; rows without one are for task instruction"),
        (messages_with("gone.png"), "row 1, column 'messages': image 0: gone.png: no such file in "),
        (messages_with("broken.png"), r"row 1, column 'messages': image 0 \(.*broken.png\): not a readable image"),
        (messages_with("wide.png"), r"image 0 \(.*wide.png\): an image of 1,024 pixels; at most 999 are decoded"),
        (messages_with("http://x.test/a.png"), "row 1, column 'messages': image 0: http://x.test/a.png is a web address"),
        (messages_with("data:image/png;base64,@@"), "row 1, column 'messages': image 0: a data: URL whose base64 is broken"),
        (messages_with("a.png", answer="an <image>"), "row 1, column 'messages': message 1: its text holds '<image>'"),
        ({"messages": [parts("light", "a.png"), reply("on"), parts("film", "a.png")]}, "an image behind the last turn of the assistant"),
        ({"messages": [{"role": "user", "content": [{"type": "video", "video": "a"}]}, reply("on")]}, "message 0: a part of the content"),
    ],
)  # fmt: skip
def test_bad_rows_are_named(row, problem, task, tmp_path, monkeypatch):
    monkeypatch.setattr(image_encoding, "MAX_PIXELS", 999)
    (tmp_path / "a.png").write_bytes(picture())
    (tmp_path / "broken.png").write_bytes(picture()[:40])
    (tmp_path / "wide.png").write_bytes(picture(side=32))
    with pytest.raises(DataError, match=problem):
        encode(task, [messages_with("a.png"), row], tmp_path)


def test_images_and_places_for_them_are_counted(task, tmp_path):
    (tmp_path / "a.png").write_bytes(picture())
    row = {"messages": [{"role": "user", "content": "<image> or <image>"}, reply("on")]}
    with pytest.raises(
        DataError, match="row 0, column 'images': 1 images, but the messages have 2"
    ):
        encode(task, [row | {"images": ["a.png"]}], tmp_path)
    with pytest.raises(
        DataError, match="nor for completion and image and prompt; the data has text:"
    ):
        encode(task, [{"text": "light"}], tmp_path)
    with pytest.raises(DataError, match="give one text for all rows as --prompt"):
        encode(task, [{"image": "a.png", "caption": "on"}], tmp_path)


@pytest.mark.parametrize(
    ("overflow", "problem"),
    [
        ("fail", "row 0, column 'image': 1[0-9] tokens, 4 of them of its images, more than max_length = 6"),
        ("truncate", "row 0, column 'image': .* an image is never cut"),
        ("drop", "all 1 examples have more than max_length = 6 tokens"),
    ],
)  # fmt: skip
def test_an_image_that_does_not_fit_is_refused(overflow, problem, task, tmp_path):
    (tmp_path / "a.png").write_bytes(picture())
    small = ImageTextToText(max_length=6, on_overflow=overflow)
    with pytest.raises(DataError, match=problem):
        encode((small, task[1]), [{"image": "a.png", "prompt": "light", "completion": "on"}], tmp_path)  # fmt: skip


def test_an_answer_is_cut_where_the_settings_say_so(task, tmp_path):
    (tmp_path / "a.png").write_bytes(picture())
    short = ImageTextToText(max_length=12, on_overflow="truncate")
    row = {"image": "a.png", "prompt": "light", "completion": "on " * 20}
    with pytest.warns(UserWarning, match="were truncated"):
        (encoded,) = encode((short, task[1]), [row], tmp_path)
    assert len(encoded["input_ids"]) == len(encoded["labels"]) == 12


def test_a_fleet_refuses_images(llava):
    with pytest.raises(UnsupportedError, match="'image-text-to-text' cannot be trained as a fleet"):
        row_losses_of(ImageTextToText(), llava[0])


def test_the_preview_shows_an_image_once(task, tmp_path):
    (tmp_path / "a.png").write_bytes(picture())
    (encoded,) = encode(task, [messages_with("a.png")], tmp_path)
    shown = task[0].preview(encoded, task[1])
    assert shown == [("<|user|><image>light</s><|assistant|>", False), ("on</s>", True)]


def test_addresses_are_fetched_where_they_are_allowed(task, tmp_path, httpserver_file):
    out = ImageTextToText(max_length=200, allow_urls=True)
    (encoded,) = encode((out, task[1]), [messages_with(httpserver_file)], tmp_path)
    assert encoded["images"][0]["bytes"] == picture()
    with pytest.raises(DataError, match="cannot be fetched"):
        encode((out, task[1]), [messages_with(httpserver_file + "gone")], tmp_path)


@pytest.fixture
def httpserver_file(tmp_path_factory):
    """The address of a picture on a server of this machine."""
    import functools
    import http.server
    import threading

    root = tmp_path_factory.mktemp("www")
    (root / "a.png").write_bytes(picture())
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(root))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/a.png"
        server.shutdown()


@pytest.mark.data
def test_emoji_captions_run(data, tmp_path):
    """Real pictures and captions through a tiny random model: proof that it runs, no more."""
    source = Dataset.from_parquet(str(data / "emoji_captions" / "twemoji.parquet"))
    for split, rows in (("train", range(64)), ("validation", range(64, 80))):
        source.select(rows).to_parquet(tmp_path / f"{split}.parquet")
    base = models.folder("idefics3", tmp_path / "model")
    result = train(
        TrainSettings(
            model=base, task="image-text-to-text", data=str(tmp_path), out=str(tmp_path / "run"), prompt="what is it?",
            lr=0.1, batch_size=16, epochs=3, device="cpu", preview=0,
            ignore_columns=["short_name", "category", "subcategory", "unified"],
        ),
        vt.VeraConfig(rank=32),
    )  # fmt: skip
    assert result.after["loss"] < result.before["loss"]
