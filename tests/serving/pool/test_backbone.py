"""Adapters of a backbone, on the model with a head."""

import pytest
import torch

import veratune as vt
from tests import fakes
from veratune.adapter import check_fits
from veratune.errors import BaseModelError
from veratune.serving.pool.backbone import at_backbone


def adapter_of(model, **changes):
    vt.attach(model, vt.VeraConfig(rank=4, targets=("query",), **changes))
    return vt.extract(fakes.scramble(model, "default"))


def test_layers_of_the_backbone_get_its_prefix():
    whole = fakes.bert(labels=2)
    adapter = adapter_of(fakes.bert(labels=2).bert)
    found = at_backbone(whole, adapter)
    assert set(found.shapes) == {f"bert.{name}" for name in adapter.shapes}
    for name, b in adapter.b.items():
        assert torch.equal(found.b[f"bert.{name}"], b)
    assert check_fits(whole, found)


def test_other_adapters_stay_as_they_are():
    whole = fakes.bert(labels=2)
    own = adapter_of(fakes.bert(labels=2))
    assert at_backbone(whole, own) is own
    unique = adapter_of(fakes.bert(), sharing="unique")
    assert at_backbone(whole, unique) is unique
    llama = adapter_of(fakes.llama())
    assert at_backbone(whole, llama) is llama


def test_another_backbone_is_refused():
    whole = fakes.bert(labels=2)
    with torch.no_grad():
        for p in whole.bert.parameters():
            p.add_(torch.randn_like(p))
    adapter = adapter_of(fakes.bert(labels=2).bert)
    with pytest.raises(BaseModelError, match="another base model"):
        at_backbone(whole, adapter)
