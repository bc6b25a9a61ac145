import torch

import veratune as vt
from tests import fakes
from tests.fakes import scramble
from veratune.analysis.inspect import figures, plot, summary


def adapter(**settings):
    model = vt.attach(fakes.llama(num_hidden_layers=12), vt.VeraConfig(rank=8, **settings), "a")
    return vt.extract(scramble(model, "a"))


def test_figures_are_the_norms_in_the_order_of_the_blocks():
    found = figures(adapter())
    assert [f.layer.split(".")[2] for f in found] == [str(i) for i in range(12) for _ in "qv"]
    own = adapter()
    for entry in found:
        assert entry.d_norm == torch.linalg.vector_norm(own.d[entry.layer]).item()
        assert (entry.out_features, entry.in_features) == own.shapes[entry.layer]


def test_a_vector_that_is_not_trained_has_no_figure(tmp_path):
    own = adapter(vectors="b")
    assert all(f.d_norm is None and f.b_norm is not None for f in figures(own))
    plot(own, tmp_path / "x.png")
    assert summary(own)["trainable"] == own.trained_values
