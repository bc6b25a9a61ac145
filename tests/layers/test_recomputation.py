"""Gradient checkpointing with another adapter in backward than in the forward is refused."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import veratune as vt
from tests import fakes
from tests.fakes import scramble
from veratune.errors import AdapterStateError

KINDS = pytest.mark.parametrize("reentrant", [True, False])


def two_adapters():
    model = vt.attach(fakes.llama(), vt.VeraConfig(rank=4), "a")
    vt.attach(model, vt.VeraConfig(rank=4, seed=2), "b")
    for name in "ab":
        scramble(model, name)
    return model


def checkpointed(model, reentrant):
    """One layer's output, with its forward computed again in backward."""
    layer = model.model.layers[0].self_attn.q_proj
    x = torch.randn(2, 3, 32, requires_grad=True)
    return checkpoint(layer, x, use_reentrant=reentrant).square().sum()


@KINDS
def test_another_adapter_in_backward_is_refused(reentrant):
    model = two_adapters()
    vt.use(model, "a")
    loss = checkpointed(model, reentrant)
    vt.use(model, "b")
    with pytest.raises(AdapterStateError, match="again with adapter 'b'; its forward ran with ada"):
        loss.backward()
    assert all(p.grad is None for p in model.parameters())


@KINDS
def test_two_losses_of_two_adapters_in_one_backward_are_refused(reentrant):
    model = two_adapters()
    losses = []
    for name in "ab":
        vt.use(model, name)
        losses.append(checkpointed(model, reentrant))
    with pytest.raises(AdapterStateError, match=r"again with adapter 'b'"):
        sum(losses).backward()


@KINDS
def test_the_end_of_rows_and_of_disabled_is_seen(reentrant):
    model = two_adapters()
    with vt.rows(model, ["a", "b"]):
        loss = checkpointed(model, reentrant)
    with pytest.raises(AdapterStateError, match=r"its forward ran with the adapters of rows\(\)"):
        loss.backward()
    with vt.disabled(model):
        loss = checkpointed(model, reentrant)
    with pytest.raises(AdapterStateError, match="its forward ran with the base model"):
        loss.backward()


@KINDS
def test_a_reference_between_forward_and_backward_is_allowed(reentrant):
    model = two_adapters()
    vt.use(model, "a")
    for _ in range(2):
        loss = checkpointed(model, reentrant)
        with vt.disabled(model), torch.no_grad():
            checkpointed(model, reentrant)
        with vt.rows(model, ["a", "b"]):
            checkpointed(model, reentrant).backward()
        loss.backward()
    layer = model.model.layers[0].self_attn.q_proj
    assert layer.vectors("a")[0].d.grad is not None


@KINDS
def test_the_gradients_are_those_without_checkpointing(reentrant):
    torch.manual_seed(0)
    model = two_adapters()
    vt.use(model, "a")
    layer = model.model.layers[0].self_attn.q_proj
    x = torch.randn(2, 3, 32, requires_grad=True)
    layer(x).square().sum().backward()
    wanted = layer.vectors("a")[0].d.grad.clone()
    layer.vectors("a")[0].d.grad = None
    checkpoint(layer, x, use_reentrant=reentrant).square().sum().backward()
    torch.testing.assert_close(layer.vectors("a")[0].d.grad, wanted)
