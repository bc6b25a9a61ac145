"""Mixed batches of models whose batch is not dimension 0, or whose layers see no batch at all."""

import pytest
import torch
import transformers as hf
from torch import nn

import veratune as vt
from tests import fakes
from tests.fakes import scramble
from veratune.errors import UnsupportedError

LIVELY = 0.3
NAMES = ["a", "b", None, "b"]


def two(model, targets="all-linear"):
    for i, name in enumerate("ab"):
        vt.attach(model, vt.VeraConfig(rank=4, targets=targets, seed=i), name)
        scramble(model, name, seed=i)
    return model


def xlnet():
    config = hf.XLNetConfig(
        vocab_size=99, d_model=32, n_layer=2, n_head=4, d_inner=48, dropout=0.0,
        initializer_range=LIVELY,
    )  # fmt: skip
    return fakes.seeded(lambda: hf.XLNetModel(config))


def longformer():
    config = hf.LongformerConfig(
        vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=48, attention_window=4, max_position_embeddings=64,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, initializer_range=LIVELY,
        pad_token_id=1,
    )  # fmt: skip
    return fakes.seeded(lambda: hf.LongformerModel(config))


def switch():
    config = hf.SwitchTransformersConfig(
        vocab_size=99, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_decoder_layers=2,
        num_heads=4, num_experts=4, expert_capacity=64, num_sparse_encoder_layers=1,
        num_sparse_decoder_layers=1, dropout_rate=0.0, router_jitter_noise=0.0,
        initializer_factor=3.0,
    )  # fmt: skip
    return fakes.seeded(lambda: hf.SwitchTransformersEncoderModel(config))


def deberta():
    config = hf.DebertaV2Config(
        vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=48, relative_attention=True, pos_att_type=["p2c", "c2p"],
        position_buckets=8, share_att_key=True, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0, initializer_range=LIVELY,
    )  # fmt: skip
    return fakes.seeded(lambda: hf.DebertaV2Model(config))


def output(model, tokens):
    return model(input_ids=tokens)[0]


@pytest.mark.parametrize("length", [4, 8, 5])
@pytest.mark.parametrize("make", [xlnet, longformer, switch], ids=lambda make: make.__name__)
def test_each_row_is_what_it_is_alone(make, length):
    model = two(make())
    tokens = torch.randint(2, 99, (4, length))
    with vt.rows(model, NAMES):
        mixed = output(model, tokens)
        again = output(model, tokens)
    assert torch.equal(mixed, again)
    for i, name in enumerate(NAMES):
        vt.use(model, name)
        torch.testing.assert_close(mixed[i], output(model, tokens)[i], rtol=1e-3, atol=1e-4)


def test_the_proof_survives_equal_rows_and_serves_later_calls():
    model = two(fakes.llama())
    same = torch.randint(2, 99, (1, 6)).expand(4, 6)
    for tokens in (same, torch.randint(2, 99, (4, 1)), torch.randint(2, 99, (4, 4))):
        with vt.rows(model, NAMES):
            mixed = output(model, tokens)
        for i, name in enumerate(NAMES):
            vt.use(model, name)
            torch.testing.assert_close(mixed[i], output(model, tokens)[i], rtol=1e-3, atol=1e-4)


def test_a_layer_that_sees_no_batch_is_refused_by_name():
    model = two(deberta(), targets=["query_proj", "value_proj"])
    tokens = torch.randint(2, 99, (4, 6))
    with vt.rows(model, NAMES), pytest.raises(UnsupportedError, match="query_proj' cannot mix"):
        output(model, tokens)
    vt.use(model, "a")
    alone = output(model, tokens)
    with vt.rows(model, ["a"] * 4):  # one adapter needs no proof
        torch.testing.assert_close(output(model, tokens), alone, rtol=1e-4, atol=1e-5)


def test_tokens_in_another_order_are_refused():
    class Shuffled(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(6, 6)

        def forward(self, x):
            order = x[:, 0].argsort()
            return self.inner(x[order])[order.argsort()]

    model = two(fakes.seeded(Shuffled), targets=["inner"])
    with vt.rows(model, ["a", "b"]), pytest.raises(UnsupportedError, match="'inner' cannot mix"):
        model(torch.randn(8, 6))


def test_the_sequence_first_in_a_module_of_ones_own():
    class Transposed(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(6, 6)

        def forward(self, x):
            return self.inner(x.transpose(0, 1)).transpose(0, 1)

    model = two(fakes.seeded(Transposed), targets=["inner"])
    x = torch.randn(4, 8, 6)
    with vt.rows(model, NAMES):
        mixed = model(x)
    for i, name in enumerate(NAMES):
        vt.use(model, name)
        torch.testing.assert_close(mixed[i], model(x)[i])


def test_no_hook_stays_behind():
    model = two(xlnet())
    with vt.rows(model, NAMES):
        output(model, torch.randint(2, 99, (4, 4)))
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    assert not any("forward" in m.__dict__ for m in model.modules())
