"""disabled, reference, and calls through the wrappers that people have."""

import copy

import pytest
import torch
from torch import nn

import veratune as vt
from tests import fakes
from tests.fakes import scramble
from veratune.errors import AdapterStateError

TOKENS = torch.arange(2, 26).view(3, 8)


def logits(model):
    return model(input_ids=TOKENS).logits


def trained(**settings):
    return scramble(vt.attach(fakes.llama(), vt.VeraConfig(rank=8, **settings), "a"), "a")


def test_disabled_is_the_base_model_within_the_block():
    model = trained()
    y = logits(model)
    with vt.disabled(model):
        assert vt.active(model) is None
        assert torch.equal(logits(model), logits(fakes.llama()))
    assert vt.active(model) == "a"
    assert torch.equal(logits(model), y)
    with pytest.raises(ZeroDivisionError), vt.disabled(model):
        raise ZeroDivisionError
    assert torch.equal(logits(model), y)
    vt.merge(model)
    with pytest.raises(AdapterStateError, match="unmerge before disabling"), vt.disabled(model):
        pass


def test_disabled_within_rows():
    model = trained()
    with vt.rows(model, ["a", None, "a"]):
        mixed = logits(model)
        with vt.disabled(model):
            assert torch.equal(logits(model), logits(fakes.llama()))
        assert torch.equal(logits(model), mixed)


def test_a_reference_shares_all_weights_and_has_no_adapter():
    model = trained(targets="all-linear").train()
    reference = vt.reference(model)
    assert type(reference) is type(model)
    assert vt.adapters(reference) == {}
    assert torch.equal(logits(reference), logits(fakes.llama()))
    storage = {p.data_ptr() for p in model.parameters()}
    assert all(p.data_ptr() in storage for p in reference.parameters())
    assert model.training
    assert not reference.training
    reference.train()
    reference.eval()
    assert all(module.training for module in model.modules())
    assert "save_pretrained" not in reference.__dict__
    assert vt.adapters(model).keys() == {"a"}


def test_a_reference_refuses_merged_weights():
    model = trained()
    reference = vt.reference(model)
    vt.merge(model)
    with pytest.raises(AdapterStateError, match="'a' is merged into the weights that this ref"):
        logits(reference)
    with pytest.raises(AdapterStateError, match="unmerge before making a reference"):
        vt.reference(model)
    vt.unmerge(model)
    assert torch.equal(logits(reference), logits(fakes.llama()))


def test_a_references_loss_is_log_two_away_from_nothing():
    """DPO's loss when the policy starts as the reference: log 2."""
    model = vt.attach(fakes.llama(), vt.VeraConfig(rank=8), "a")
    policy, reference = logits(model), logits(vt.reference(model))
    loss = -nn.functional.logsigmoid((policy - reference).sum())
    torch.testing.assert_close(loss, torch.tensor(2.0).log())


class Wrapper(nn.Module):
    """As a Lightning module, DistributedDataParallel or a SentenceTransformer holds a model."""

    def __init__(self, model):
        super().__init__()
        self.module = nn.Sequential(model)

    def forward(self, **batch):
        return self.module[0](**batch)


@pytest.mark.parametrize("wrap", [Wrapper, lambda m: torch.compile(m, backend="eager")])
def test_calls_through_a_wrapper(tmp_path, wrap):
    model = trained()
    wrapped = wrap(model)
    vt.save(model, tmp_path / "plain.safetensors")
    vt.save(wrapped, tmp_path / "wrapped.safetensors")
    plain, through = (tmp_path / f"{name}.safetensors" for name in ("plain", "wrapped"))
    assert plain.read_bytes() == through.read_bytes()
    assert vt.adapters(wrapped).keys() == {"a"}
    y = logits(model)
    vt.use(wrapped, None)
    assert vt.active(model) is None
    vt.use(wrapped, "a")
    vt.merge(wrapped)
    vt.unmerge(wrapped)
    with vt.disabled(wrapped):
        assert torch.equal(logits(model), logits(fakes.llama()))
    assert torch.equal(logits(model), y)
    assert torch.equal(logits(vt.reference(wrapped)), logits(fakes.llama()))
    vt.detach(wrapped)
    assert vt.adapters(model) == {}


def test_a_copy_has_a_save_pretrained_of_its_own():
    model = trained()
    other = copy.deepcopy(model)
    assert other.__dict__["save_pretrained"].args[0] is other
