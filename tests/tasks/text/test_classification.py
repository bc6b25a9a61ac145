from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset

from tests import fakes
from veratune.errors import AdapterFileError, DataError
from veratune.tasks.registry import task_from_metadata
from veratune.tasks.text.classification import TextClassification, TextRegression


def rows(labels, **more):
    return Dataset.from_dict({"text": ["good film"] * len(labels), "label": labels, **more})


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        ([0, 1, 0], ["0", "1"]),
        ([2, 0], ["0", "1", "2"]),
        (["no", "yes", "no"], ["no", "yes"]),
        ([True, False], ["False", "True"]),
    ],
)
def test_label_names_come_from_the_training_rows(labels, names):
    task = TextClassification()
    task.fit_labels(rows(labels))
    assert task.labels == names
    targets = task.encode(rows(labels), fakes.tokenizer())["labels"]
    assert [task.labels[t] for t in targets] == [str(x) for x in labels]
    again = task_from_metadata(task.to_metadata())
    assert isinstance(again, TextClassification)
    assert again.labels == names


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([-1, 0], "label -1 in column 'label' is negative; classes are counted from 0"),
        ([0.5, 1.5], "labels in column 'label' are float; use --task text-regression"),
        ([1, 2, 1], "labels in column 'label' begin at 1; classes are counted from 0"),
        (["a", "a"], "all rows have the label 'a'; at least two classes are wanted"),
        ([0, 999_999], "label 999999 in column 'label' is no class; use --task text-regression"),
    ],
)
def test_bad_labels(labels, message):
    with pytest.raises(DataError, match=message):
        TextClassification().fit_labels(rows(labels))


def test_labels_outside_the_range_name_the_row():
    task = TextClassification(labels=["no", "yes"])
    with pytest.raises(DataError, match="row 1: label 2 in column 'label' is none of no, yes"):
        task.encode(rows([0, 2]), fakes.tokenizer())
    with pytest.raises(
        DataError, match="row 0: label 'maybe' in column 'label' is none of no, yes"
    ):
        task.encode(rows(["maybe"]), fakes.tokenizer())


def test_pairs_and_length():
    task, tokenizer = TextClassification(max_length=7, labels=["a", "b"]), fakes.tokenizer()
    one = task.encode(rows([0]), tokenizer)[0]["input_ids"]
    with pytest.warns(UserWarning, match="1 of 1 examples have more than max_length = 7 tokens"):
        two = task.encode(rows([0], sentence2=["awful movie"]), tokenizer)[0]["input_ids"]
    assert len(one) < len(two) == 7


def test_a_column_named_pair_is_the_pair():
    task, tokenizer = TextClassification(labels=["a", "b"]), fakes.tokenizer()
    named, usual = rows([0], pair=["awful movie"]), rows([0], sentence2=["awful movie"])
    assert task.encode(named, tokenizer)[0] == task.encode(usual, tokenizer)[0]
    assert task.used_columns(named) == {"text", "pair", "label"}


def test_a_text_that_is_too_long_is_reported():
    tokenizer = fakes.tokenizer()
    data = Dataset.from_dict({"text": ["film", "turn the light on please"], "label": [0, 1]})

    def encode(on_overflow, training):
        task = TextClassification(max_length=4, labels=["a", "b"], on_overflow=on_overflow)
        return task.encode(data, tokenizer, training)

    with pytest.warns(UserWarning, match="1 of 2 examples .* were truncated"):
        assert encode("truncate", True)["labels"] == [0, 1]
    with pytest.warns(UserWarning, match="1 of 2 examples .* were dropped"):
        assert encode("drop", True)["labels"] == [0]
    with pytest.warns(UserWarning, match="1 of 2 examples .* were truncated"):
        assert encode("drop", False)["labels"] == [0, 1]  # scores cover all examples
    with pytest.raises(DataError, match="row 1: [0-9]+ tokens, more than max_length = 4"):
        encode("fail", True)


def test_text_must_be_text():
    with pytest.raises(DataError, match="row 1: column 'text' holds None, text is wanted"):
        TextClassification(labels=["0", "1"]).encode(
            Dataset.from_dict({"text": ["a", None], "label": [0, 1]}), fakes.tokenizer()
        )


def test_scores():
    logits = np.array([[2.0, 1.0], [0.0, 3.0], [0.0, 3.0], [1.0, 0.0]])
    score = TextClassification(labels=["a", "b"]).metrics()(
        SimpleNamespace(predictions=logits, label_ids=np.array([0, 1, 0, 0]))
    )
    assert score == {
        "accuracy": 0.75,
        "f1": pytest.approx(2 / 3),
        "matthews": pytest.approx(0.57735, abs=1e-5),
    }
    score = TextRegression().metrics()(
        SimpleNamespace(
            predictions=np.array([[1.0], [2.0], [3.0]]), label_ids=np.array([2.0, 4.0, 6.0])
        )
    )
    assert score["pearson"] == pytest.approx(1)
    assert score["mse"] == pytest.approx(14 / 3)
    flat = TextRegression().metrics()(
        SimpleNamespace(predictions=np.ones((3, 1)), label_ids=np.array([2.0, 4.0, 6.0]))
    )
    assert flat["pearson"] == 0.0


def test_regression_targets():
    task = TextRegression()
    assert task.encode(rows(["1.5", "2"]), fakes.tokenizer())["labels"] == [1.5, 2.0]
    with pytest.raises(DataError, match="row 0: label 'x' in column 'label' is not a number"):
        task.encode(rows(["x"]), fakes.tokenizer())
    with pytest.raises(DataError, match="row 1: label nan in column 'label' is not finite"):
        task.encode(rows([1.0, float("nan")]), fakes.tokenizer())


def test_heads_are_what_stands_beside_the_backbone():
    assert TextClassification().heads(fakes.bert(labels=2)) == ("classifier",)
    assert TextClassification().heads(
        fakes.seeded(
            lambda: __import__("transformers").LlamaForSequenceClassification(fakes.llama().config)
        )
    ) == ("score",)


def test_an_unknown_task_in_a_file():
    with pytest.raises(AdapterFileError, match="is not known here"):
        task_from_metadata({"name": "telepathy"})
    with pytest.raises(AdapterFileError, match="is not known here"):
        task_from_metadata({"name": "instruction", "colour": 3})


def loaded_on(task, labels, folder, base):
    """A task's model from a saved base, with its head started from the labels."""
    base.save_pretrained(folder)
    tokenizer = fakes.tokenizer()
    task.fit_labels(rows(labels))
    model = task.load_model(str(folder), tokenizer)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    task.init_head(model, task.encode(rows(labels), tokenizer))
    return model, before


def test_a_new_classifier_starts_at_the_log_of_the_class_frequencies(tmp_path):
    task = TextClassification()
    model, before = loaded_on(task, [0, 0, 0, 2], tmp_path, fakes.bert())
    bias = model.classifier.bias.detach()
    assert bias.exp().tolist() == pytest.approx([0.75, 0.125, 0.25])  # class 1 has no row
    assert torch.equal(model.classifier.weight, before["classifier.weight"])
    assert task.target_scale == 1.0


def test_a_new_regression_head_starts_at_the_mean_in_units_of_the_spread(tmp_path):
    task = TextRegression()
    model, before = loaded_on(task, [10.0, 30.0, 20.0], tmp_path, fakes.bert())
    spread = np.std([10.0, 30.0, 20.0])
    assert model.classifier.bias.item() == pytest.approx(20.0)
    assert task.target_scale == pytest.approx(spread)
    assert torch.allclose(model.classifier.weight, before["classifier.weight"] * spread)


def test_constant_targets_are_no_division_by_zero(tmp_path):
    task = TextRegression()
    model, _ = loaded_on(task, [3.0, 3.0], tmp_path, fakes.bert())
    assert (task.target_scale, model.classifier.bias.item()) == (1.0, 3.0)


def test_a_head_that_the_checkpoint_brings_keeps_its_values(tmp_path):
    model, before = loaded_on(TextClassification(), [0, 0, 1], tmp_path, fakes.bert(labels=2))
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name


def test_a_head_without_a_bias_keeps_its_values(tmp_path):
    model, before = loaded_on(TextRegression(), [1.0, 2.0], tmp_path, fakes.llama())
    assert torch.equal(model.score.weight, before["score.weight"])
