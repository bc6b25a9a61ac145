import dataclasses

import pytest
import torch

import veratune as vt
from tests import fakes
from tests.fakes import scramble
from veratune.errors import AdapterError, AdapterFileError, BaseModelError

TOKENS = torch.arange(2, 26).view(3, 8)


def trained(model=None, **settings):
    model = fakes.llama() if model is None else model
    vt.attach(model, vt.VeraConfig(rank=8, **settings), "a")
    return scramble(model, "a")


def test_out_of_one_model_and_into_another():
    model = trained(targets="all-linear", rank_pattern={"mlp.up_proj": 3})
    adapter = vt.extract(model)
    other = fakes.llama()
    vt.install(other, adapter, "b")
    torch.testing.assert_close(other(TOKENS).logits, model(TOKENS).logits)
    assert not any(p.requires_grad for p in other.parameters())
    vt.install(other, adapter, "c", trainable=True)
    assert sum(p.numel() for p in other.parameters() if p.requires_grad) == adapter.trained_values


def test_a_merged_adapter_is_extracted_as_it_is():
    model = trained()
    before = vt.extract(model)
    vt.merge(model)
    after = vt.extract(model)
    assert all(
        torch.equal(before.d[k], after.d[k]) and torch.equal(before.b[k], after.b[k])
        for k in before.d
    )
    assert torch.equal(before.weight_fingerprint, after.weight_fingerprint)


def test_head_and_task_travel():
    model = trained(fakes.bert(labels=3), head=["classifier"])
    adapter = dataclasses.replace(vt.extract(model), task={"name": "x"})
    assert set(adapter.head) == {"classifier.weight", "classifier.bias"}
    other = fakes.bert(labels=3)
    vt.install(other, adapter, "b")
    assert torch.equal(other(TOKENS).logits, model(TOKENS).logits)
    assert vt.extract(other).task == {"name": "x"}
    with pytest.raises(
        BaseModelError,
        match=r"head tensor 'classifier.bias': the file has \(3,\), the model has \(2,\)",
    ):
        vt.install(fakes.bert(labels=2), adapter, "b")


def test_another_base_is_refused_by_layer_shape_or_weights():
    adapter = vt.extract(trained())
    with pytest.raises(
        BaseModelError,
        match=r"it has layer 'model.layers.0.self_attn.q_proj', GPT2LMHeadModel has not",
    ):
        vt.install(fakes.gpt2(), adapter, "a")
    with pytest.raises(
        BaseModelError,
        match="layer 'model.layers.0.self_attn.v_proj' is 32 -> 16 in the file and 32 -> 32 in Llama",
    ):
        vt.install(fakes.seeded(lambda: type(fakes.llama())(fakes.llama().config.__class__(
            **{**fakes.llama().config.to_dict(), "num_key_value_heads": 4}))), adapter, "a")  # fmt: skip
    torch.manual_seed(1)
    stranger = type(fakes.llama())(fakes.llama().config)
    with pytest.raises(
        BaseModelError, match=r"the layers fit, but the weights of .* agree only to -?0\.\d\d"
    ):
        vt.install(stranger, adapter, "a")
    assert vt.adapters(stranger) == {}
    vt.install(stranger, adapter, "a", check_base=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_same_base_in_fewer_bits_is_welcome(dtype):
    vt.install(fakes.llama().to(dtype), vt.extract(trained()), "a")


def test_a_file_tells_no_one_where_the_base_model_lay(tmp_path):
    fakes.llama().save_pretrained(tmp_path / "my-llama")
    model = type(fakes.llama()).from_pretrained(tmp_path / "my-llama")
    assert vt.extract(trained(model)).base_id == "my-llama"
    model.config._name_or_path = "org/model"
    assert vt.extract(model).base_id == "org/model"


def test_a_name_is_needed_when_there_are_several():
    model = trained()
    vt.attach(model, vt.VeraConfig(rank=2), "b")
    vt.use(model, None)
    with pytest.raises(AdapterError, match="say which adapter: the model has 'a', 'b'"):
        vt.extract(model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: {"d": {**a.d, "x": torch.ones(8)}}, "d of layer 'x' is not expected"),
        (lambda a: {"b": {}}, "b of layer 'model.layers.0.self_attn.q_proj' is missing"),
        (
            lambda a: {"d": {k: torch.ones(64) for k in a.d}},
            r"layer 'model.layers.0.self_attn.q_proj' \(32 -> 32\): the file has d of shape \(64,\), the config says rank 8",
        ),
        (
            lambda a: {"b": {k: v * float("nan") for k, v in a.b.items()}},
            "b holds NaN or infinity; the training run diverged",
        ),
        (
            lambda a: {"head": {"x.weight": torch.ones(1)}},
            "head tensor 'x.weight' belongs to none of the config's heads",
        ),
        (lambda a: {"shapes": {}, "d": {}, "b": {}}, "the adapter has no layers"),
    ],
)
def test_an_adapter_is_checked_when_it_is_made(change, message):
    adapter = vt.extract(trained())
    with pytest.raises(AdapterFileError, match=message):
        dataclasses.replace(adapter, **change(adapter))
