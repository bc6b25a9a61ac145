import json

import pytest
from datasets import Dataset, disable_caching

from veratune.errors import DataError
from veratune.tasks.data import has_split, load_examples, pick_columns, read_text

ROWS = [{"text": "a, b", "label": 1}, {"text": "c", "label": 0}]
disable_caching()


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def write(path, rows=ROWS):
    data = Dataset.from_list(rows)
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".csv":
        data.to_csv(path, index=False)
    elif path.suffix == ".tsv":
        data.to_csv(path, index=False, sep="\t")
    elif path.suffix == ".parquet":
        data.to_parquet(path)
    return path


@pytest.mark.parametrize("ending", ["jsonl", "json", "csv", "tsv", "parquet"])
def test_every_kind_of_file(ending, tmp_path):
    assert list(load_examples(str(write(tmp_path / f"x.{ending}")))) == ROWS


def test_plain_text(tmp_path):
    (tmp_path / "x.txt").write_text("one\ntwo\n")
    assert load_examples(str(tmp_path / "x.txt"))["text"] == ["one", "two"]


def test_a_folder_has_splits(tmp_path):
    write(tmp_path / "train.jsonl")
    write(tmp_path / "dev.jsonl", ROWS[:1])
    assert len(load_examples(str(tmp_path), "train")) == 2
    assert len(load_examples(str(tmp_path), "validation")) == 1
    assert has_split(str(tmp_path), "validation")
    assert not has_split(str(tmp_path), "test")
    assert not has_split(str(tmp_path / "train.jsonl"), "train")
    with pytest.raises(
        DataError, match="no file for the split 'test'; it has dev.jsonl, train.jsonl"
    ):
        load_examples(str(tmp_path), "test")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", "", "the file is empty; at least one row is wanted"),
        ("x.json", "[]", "the data set is empty|cannot be read as json"),
        ("x.csv", "text,label\n", "the data set is empty; at least one row is wanted"),
        ("x.jsonl", "{not json", "cannot be read as json"),
        ("x.parquet", "PAR1 not really", "cannot be read as parquet"),
        (
            "x.docx",
            "?",
            r"unknown kind of file; .jsonl, .json, .csv, .tsv, .parquet, .txt can be read",
        ),
    ],
)
def test_bad_files(name, content, message, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message) as caught:
        load_examples(str(tmp_path / name))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("ending", ["csv", "jsonl", "txt"])
def test_latin_1_is_refused_in_one_line(tmp_path, ending):
    path = tmp_path / f"x.{ending}"
    path.write_bytes('{"text": "caf\xe9"}\n'.encode("latin1"))
    with pytest.raises(DataError, match=f"x.{ending}: not UTF-8 .*iconv -f latin1") as caught:
        load_examples(str(path))
    assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match="not UTF-8 .byte 13 is 0xe9"):
        read_text(path)
    path.write_text('{"text": "caf\xe9"}\n', encoding="utf-8")
    assert read_text(path) == '{"text": "caf\xe9"}\n'


def test_what_is_not_there(tmp_path):
    with pytest.raises(DataError, match="no such file or folder"):
        load_examples(str(tmp_path / "nothing.jsonl"))
    with pytest.raises(
        DataError, match="is no local file or folder, and as a data set id it could not be fetched"
    ):
        load_examples("nobody/nothing")
    with pytest.raises(DataError, match="is a file; a configuration"):
        load_examples(str(write(tmp_path / "x.jsonl")), config="mrpc")


def test_columns():
    rows = Dataset.from_list([{"sentence": "a", "gold": 1, "text": "b"}])
    roles = {"text": ("text", "sentence"), "pair": ("text_pair",), "label": ("label",)}
    assert pick_columns(rows, roles, {"label": "gold"}, frozenset({"pair"})) == {
        "text": "text",
        "label": "gold",
    }
    assert (
        pick_columns(rows, roles, {"label": "gold", "text": "sentence"}, frozenset({"pair"}))[
            "text"
        ]
        == "sentence"
    )
    with pytest.raises(
        DataError,
        match=r"no column for label \(looked for label\); the data has sentence, gold, text: say which",
    ):
        pick_columns(rows, roles, {}, frozenset({"pair"}))
    with pytest.raises(
        DataError, match="no column 'glod' for label; the data has .*; did you mean 'gold'"
    ):
        pick_columns(rows, roles, {"label": "glod"}, frozenset({"pair"}))
    with pytest.raises(
        DataError,
        match="columns names the role 'lable'; this task has text, pair, label; did you mean 'label'",
    ):
        pick_columns(rows, roles, {"lable": "gold"})
