"""state_dict, save_pretrained and from_pretrained of models with adapters, merged or not."""

import json

import pytest
import torch

import veratune as vt
from tests import fakes
from tests.fakes import scramble
from veratune.errors import AdapterFileError, AdapterStateError

TOKENS = torch.arange(2, 26).view(3, 8)


def logits(model):
    return model(input_ids=TOKENS).logits


def two():
    model = fakes.llama()
    vt.attach(model, vt.VeraConfig(rank=8), "alice")
    vt.attach(model, vt.VeraConfig(rank=4, targets="all-linear", seed=3), "bob")
    return scramble(scramble(model, "alice"), "bob", seed=1)


def saved(model, path):
    with pytest.warns(UserWarning, match="veratune.from_pretrained loads both"):
        model.save_pretrained(path)


def test_there_and_back(tmp_path):
    model = two()
    vt.use(model, "alice")
    saved(model, tmp_path)
    again = vt.from_pretrained(tmp_path)
    assert type(again) is type(model)
    assert vt.active(again) == "alice"
    torch.testing.assert_close(logits(again), logits(model))
    vt.use(model, "bob")
    vt.use(again, "bob")
    torch.testing.assert_close(logits(again), logits(model))
    plain = type(model).from_pretrained(tmp_path)
    assert torch.equal(logits(plain), logits(fakes.llama()))


def test_a_folder_without_adapters_is_a_plain_model(tmp_path):
    fakes.llama().save_pretrained(tmp_path)
    assert vt.adapters(vt.from_pretrained(tmp_path)) == {}


def test_saved_while_merged_is_the_plain_merged_model(tmp_path):
    model = two()
    saved(model, tmp_path)
    vt.merge(model, "bob")
    with pytest.warns(UserWarning, match="the plain model with adapter 'bob' merged in"):
        model.save_pretrained(tmp_path)
    again = vt.from_pretrained(tmp_path)
    assert vt.adapters(again) == {}
    torch.testing.assert_close(logits(again), logits(model))


def test_a_head_is_merged_into_the_saved_model_too(tmp_path):
    model = fakes.bert(labels=3)
    vt.attach(model, vt.VeraConfig(rank=4, head=["classifier"]), "a")
    scramble(model, "a")
    saved(model, tmp_path / "apart")
    torch.testing.assert_close(logits(vt.from_pretrained(tmp_path / "apart")), logits(model))
    vt.merge(model)
    with pytest.warns(UserWarning, match="merged in"):
        model.save_pretrained(tmp_path / "merged")
    again = type(model).from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(again), logits(model))


def test_the_state_dict_of_a_merged_model_holds_the_base_and_the_vectors():
    model = two()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    vt.merge(model, "bob")
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    with pytest.raises(AdapterStateError, match="unmerge before load_state_dict"):
        model.load_state_dict(after)
    vt.unmerge(model)
    model.load_state_dict(after)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[", "not a list of adapters"),
        (json.dumps({"version": 2, "adapters": [], "active": None}), "version 2; this veratune"),
        (json.dumps({"version": 1, "adapters": ["../x"], "active": None}), "not a list of names"),
        (json.dumps({"version": 1, "adapters": ["a"], "active": "b"}), "or `active` is none"),
        (json.dumps({"version": 1, "adapters": ["ghost"], "active": None}), "its file is missing"),
        ("[" * 100_000, "not a list of adapters"),
        ("0" * 2_000_000, "no list of adapters has"),
    ],
)
def test_a_damaged_list_is_refused(tmp_path, content, message):
    saved(two(), tmp_path)
    (tmp_path / "veratune" / "adapters.json").write_text(content)
    with pytest.raises(AdapterFileError, match=message):
        vt.from_pretrained(tmp_path)
