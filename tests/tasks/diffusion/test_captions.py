import pytest
from PIL import Image

from veratune.errors import DataError
from veratune.tasks.diffusion.captions import load_caption_examples


def pictures(folder, *names):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        Image.new("RGB", (4, 4)).save(folder / name)


def test_texts_stand_beside_images_in_one_file_or_nowhere(tmp_path):
    pictures(tmp_path / "a", "1.png", "2.jpg")
    (tmp_path / "a" / "1.txt").write_text("one\n")
    (tmp_path / "a" / "2.txt").write_text("two")
    assert load_caption_examples(str(tmp_path / "a"))["text"] == ["one", "two"]
    pictures(tmp_path / "b" / "train", "1.png", "2.png")
    (tmp_path / "b" / "train" / "metadata.jsonl").write_text(
        '{"file_name": "2.png", "text": "second"}\n{"file_name": "1.png", "text": "first"}\n'
    )
    assert load_caption_examples(str(tmp_path / "b"))["text"] == ["first", "second"]
    pictures(tmp_path / "dog", "1.png", "2.png")
    assert (
        load_caption_examples(str(tmp_path / "dog"), caption="a sks dog")["text"]
        == ["a sks dog"] * 2
    )
    assert "text" not in load_caption_examples(str(tmp_path / "dog")).column_names


def test_images_without_a_text_and_texts_without_an_image_are_named(tmp_path):
    pictures(tmp_path, "1.png", "2.png")
    (tmp_path / "1.txt").write_text("one")
    with pytest.raises(DataError, match="2.png has no text; put one beside it, or give --caption"):
        load_caption_examples(str(tmp_path))
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "3.png", "text": "x"}\n')
    with pytest.raises(DataError, match="it names '3.png', which is not there"):
        load_caption_examples(str(tmp_path))
    (tmp_path / "metadata.jsonl").write_text('{"file": "3.png"}\n')
    with pytest.raises(DataError, match="line 1 is no"):
        load_caption_examples(str(tmp_path))
