import gc
import threading

import pytest
import torch
from torch import nn

import veratune as vt
from tests import fakes
from veratune.ops import projection
from veratune.ops.matrix import matmul
from veratune.ops.projection import project


@pytest.fixture
def counted(monkeypatch):
    """How many products with A were taken."""
    calls = []
    monkeypatch.setattr(projection, "matmul", lambda A, x: calls.append(1) or matmul(A, x))
    return calls


def draw():
    return torch.randn(4, 6), torch.randn(3, 6)


def test_readers_of_one_input_share_the_product(counted):
    x, A = draw()
    first = project(x, A, 1)
    assert project(x, A[:], 2) is first
    assert len(counted) == 1
    torch.testing.assert_close(first, x @ A.T)


def test_a_second_visit_of_a_reader_is_another_pass(counted):
    x, A = draw()
    project(x, A, 1)
    x.data.mul_(2)  # unseen by torch's count of writes
    torch.testing.assert_close(project(x, A, 1), x @ A.T)
    assert len(counted) == 2


@pytest.mark.parametrize(
    "change",
    [
        lambda x, A: (x.mul_(2), A), lambda x, A: (x.clone(), A), lambda x, A: (x[:], A), lambda x, A: (x, A.mul_(2)),
        lambda x, A: (x, A.clone()), lambda x, A: (x, A[:2]),
    ],
)  # fmt: skip
def test_anything_changed_is_computed_anew(change):
    x, A = draw()
    project(x, A, 1)
    x, A = change(x, A)
    torch.testing.assert_close(project(x, A, 2), x @ A.T)


def test_another_thread_has_products_of_its_own(counted):
    x, A = draw()
    project(x, A, 1)
    thread = threading.Thread(target=lambda: project(x, A, 2))
    thread.start()
    thread.join()
    assert len(counted) == 2


def test_it_is_forgotten_with_its_input():
    x, A = draw()
    project(x, A, 1)
    assert projection.PROJECTIONS.product is not None
    del x
    gc.collect()
    assert projection.PROJECTIONS.product is None


def test_nobody_and_inference_mode_do_not_share(counted):
    x, A = draw()
    assert project(x, A, None) is not project(x, A, None)
    with torch.inference_mode():
        y = torch.randn(4, 6)
        assert project(y, A, 1) is not project(y, A, 2)
    assert len(counted) == 4


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x):
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)


def attention(**settings):
    torch.manual_seed(3)
    model = vt.attach(
        nn.Sequential(Attention()),
        vt.VeraConfig(rank=4, targets=["query", "key", "value"], **settings),
        "a",
    )
    return fakes.scramble(model, "a")


def test_query_key_and_value_take_one_product_in_a_pass(counted):
    model = attention(plan="projected")
    x = torch.randn(5, 8, requires_grad=True)
    for passes in (1, 2):
        torch.cat(model(x)).sum().backward()
        assert len(counted) == passes


def test_a_hook_in_between_gets_what_it_gave(counted):
    model = attention(plan="projected")
    x = torch.randn(5, 8)
    wanted = model[0].k_proj(2 * x)
    model[0].k_proj.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    torch.testing.assert_close(model(x)[1], wanted)
