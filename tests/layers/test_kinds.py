import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune, weight_norm
from transformers.pytorch_utils import Conv1D

import veratune as vt
from veratune.errors import UnsupportedError
from veratune.layers.kinds import is_linear, linear_shape, stores_transposed, weight_matrix


def test_how_a_layer_stores_its_weight():
    linear, conv1d = nn.Linear(3, 5), Conv1D(5, 3)
    assert not stores_transposed(linear)
    assert stores_transposed(conv1d)
    for layer in (linear, conv1d):
        assert is_linear(layer)
        assert linear_shape(layer) == (5, 3)
        assert weight_matrix(layer, layer.weight).shape == (5, 3)


class Double(nn.Module):
    def forward(self, x):
        return 2 * x


def parametrized(layer):
    parametrize.register_parametrization(layer, "weight", Double())
    return layer


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: parametrizations.weight_norm(nn.Linear(4, 4)), "computes its weight at each call"),
        (lambda: weight_norm(nn.Linear(4, 4)), "computes its weight at each call"),
        (lambda: parametrized(nn.Linear(4, 4)), "computes its weight at each call"),
        (lambda: prune.random_unstructured(nn.Linear(4, 4), "weight", 0.5), "computes its weight"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_a_weight_that_is_no_parameter_is_refused(make, message):
    model = nn.Sequential(make(), nn.Linear(4, 4))
    with pytest.raises(UnsupportedError, match=f"layer '0' {message}"):
        vt.attach(model, vt.VeraConfig(rank=2, targets=["0", "1"]))
    vt.attach(model, vt.VeraConfig(rank=2, targets=["1"]))
    assert model(torch.ones(2, 4)).shape == (2, 4)


@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_a_layer_without_sizes_is_refused():
    model = nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 4))
    with pytest.raises(UnsupportedError, match="layer '0' is a LazyLinear without sizes yet; run"):
        vt.attach(model, vt.VeraConfig(rank=2, targets=["1"]))
    model(torch.ones(1, 3))
    vt.attach(model, vt.VeraConfig(rank=2, targets=["0", "1"]))


class Router(nn.Linear):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return super().forward(x).topk(1)


class Unannotated(nn.Linear):
    def forward(self, x):
        return (super().forward(x),)


def test_a_router_that_returns_a_tuple_is_no_linear_layer():
    model = nn.Sequential(nn.Linear(4, 4), Router(4, 4))
    assert not is_linear(model[1])
    vt.attach(model, vt.VeraConfig(rank=2, targets=["all-linear"]))
    assert isinstance(model[1], Router)
    model = vt.attach(nn.Sequential(Unannotated(4, 4)), vt.VeraConfig(rank=2, targets=["0"]))
    with pytest.raises(UnsupportedError, match="'0' is a Unannotated, which returns a tuple"):
        model(torch.ones(1, 4))
