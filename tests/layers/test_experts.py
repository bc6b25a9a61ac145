"""VeraExperts in four parts: the float64 reference, its merged form, the identity at the start, rows."""

import copy
import logging

import pytest
import torch
import transformers as hf

import veratune as vt
from tests import fakes
from tests.fakes import scramble, seeded
from veratune.adapter import extract
from veratune.errors import UnsupportedError
from veratune.layers.experts import VeraExperts, is_experts
from veratune.ops.matrix import dense
from veratune.serving.pool.pool import AdapterPool
from veratune.targets import find_sites

TOKENS = torch.randint(1, 60, (2, 7), generator=torch.Generator().manual_seed(1))


def qwen2():
    config = hf.Qwen2MoeConfig(
        **fakes.MOE,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=12,
        shared_expert_intermediate_size=12,
    )
    return hf.Qwen2MoeForCausalLM(config)


def gpt_oss():
    model = fakes.gpt_oss()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "bias" in name or "sinks" in name:
                p.normal_(0, 0.2)
    return model


def deepseek():
    config = hf.DeepseekV3Config(
        **fakes.MOE, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=12, n_group=2,
        topk_group=1, first_k_dense_replace=1, q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4,
        qk_nope_head_dim=4, v_head_dim=8, n_shared_experts=1,
    )  # fmt: skip
    return hf.DeepseekV3ForCausalLM(config)


def dbrx():
    config = hf.DbrxConfig(
        d_model=16,
        n_heads=2,
        n_layers=2,
        vocab_size=60,
        max_seq_len=64,
        attn_config={"kv_n_heads": 2, "clip_qkv": 8.0},
        ffn_config={"ffn_hidden_size": 12, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 16},
        initializer_range=0.2,
    )
    config.attn_config.rope_theta = 10000.0
    return hf.DbrxForCausalLM(config)


FAMILIES = {
    "mixtral": fakes.mixtral,
    "qwen2": qwen2,
    "qwen3": fakes.qwen3_moe,
    "gpt_oss": gpt_oss,
    "deepseek": deepseek,
    "dbrx": dbrx,
}
EXPERTS = ["*.experts.*:*"]


def model_of(family, *names, **settings):
    model = seeded(FAMILIES[family]).double()
    model.config._experts_implementation = "eager"  # grouped_mm takes no float64
    for i, name in enumerate(names):
        config = vt.VeraConfig(rank=4, targets=EXPERTS, seed=i, **settings)
        scramble(vt.attach(model, config, name), name, seed=i)
    return model.eval()


@torch.no_grad()
def logits(model, tokens=TOKENS):
    return model(input_ids=tokens).logits


def with_delta(model, name):
    """A copy of the base model with W + ΔW, each ΔW straight from equation 2."""
    sites = [v for m in model.modules() if isinstance(m, VeraExperts) for v in m.vectors(name)]
    plain = vt.detach(copy.deepcopy(model))
    with torch.no_grad():
        for v in sites:
            path = v.layer.partition(":")[0]
            weight = plain.get_parameter(path)
            A, B = (dense(x) for x in v.pair(weight.device, torch.float64))
            delta = v.scale * torch.diag(v.b.double()) @ B @ torch.diag(v.d.double()) @ A
            experts = weight.view(4, -1, weight.shape[-1])[v.part.expert]
            experts += delta if experts.shape == delta.shape and "w2" not in path else delta.T
    return plain


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_the_float64_reference_and_its_merged_form(family):
    model = model_of(family)
    before = logits(model)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    vt.attach(model, vt.VeraConfig(rank=4, targets=EXPERTS), "a")
    torch.testing.assert_close(logits(model), before)  # the identity at the start
    scramble(model, "a")
    found = logits(model)
    assert (found - before).abs().max() > 1e-3
    torch.testing.assert_close(found, logits(with_delta(model, "a")))
    vt.merge(model)
    torch.testing.assert_close(logits(model), found)
    vt.unmerge(model)
    torch.testing.assert_close(logits(model), found)
    vt.detach(model)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_the_reference(family):
    model = model_of(family, "a")
    model(input_ids=TOKENS).logits.square().sum().backward()
    found = {
        v.layer: (v.d.grad, v.b.grad)
        for m in model.modules()
        if isinstance(m, VeraExperts)
        for v in m.vectors("a")
    }
    plain = with_delta(model, "a")
    plain.requires_grad_(True)
    plain(input_ids=TOKENS).logits.square().sum().backward()
    layers = {m.name: m for m in model.modules() if isinstance(m, VeraExperts)}
    for layer in layers.values():
        for v in layer.vectors("a"):
            grad = plain.get_parameter(v.layer.partition(":")[0]).grad
            G = layer.layouts[v.part.parameter].matrices(grad)[v.part.expert]
            A, B = (dense(x) for x in v.pair(G.device, torch.float64))
            P = v.scale * G @ A.T
            d, b = v.d.detach().double(), v.b.detach().double()
            grad_d, grad_b = found[v.layer]
            zero = torch.zeros(())
            torch.testing.assert_close(
                (grad_d if grad_d is not None else zero * d).double(), b @ (B * P)
            )
            torch.testing.assert_close(
                (grad_b if grad_b is not None else zero * b).double(), (B * P) @ d
            )


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_and_files(family, tmp_path):
    model = model_of(family, "a", "b")
    alone = []
    for name, row in (("a", 0), ("b", 1)):
        vt.use(model, name)
        alone.append(logits(model)[row])
        vt.save(model, tmp_path / f"{name}.safetensors", name=name)
    with vt.rows(model, ["a", "b"]):
        torch.testing.assert_close(logits(model), torch.stack(alone))
    fresh = model_of(family)
    vt.load(fresh, tmp_path / "b.safetensors")
    torch.testing.assert_close(logits(fresh)[1], alone[1])


def test_one_expert_alone_and_another_rank_for_it():
    model = model_of("mixtral")
    before = logits(model)
    config = vt.VeraConfig(
        rank=4,
        targets=["model.layers.0.mlp.experts.gate_up_proj:2", "down_proj"],
        rank_pattern={"*:1": 6},
    )
    sites = {site.name: site.rank for site in find_sites(model, config)}
    assert len(sites) == 1 + 2 * 4
    assert sites["model.layers.1.mlp.experts.down_proj:1"] == 6
    scramble(vt.attach(model, config, "a"), "a")
    found = logits(model)
    assert not torch.allclose(found, before)
    torch.testing.assert_close(found, logits(with_delta(model, "a")))


def test_all_linear_takes_the_experts_and_says_what_it_leaves_out(caplog):
    model = model_of("mixtral")
    with caplog.at_level(logging.WARNING, logger="veratune"):
        vt.attach(model, vt.VeraConfig(rank=4, targets=["all-linear"]), "a")
    assert sum(isinstance(m, VeraExperts) for m in model.modules()) == 2
    (record,) = caplog.records
    assert record.getMessage().startswith("all-linear leaves out ")
    assert "of the weights: model.layers.*.mlp.gate.weight" in record.getMessage()


def test_other_modules_are_no_experts():
    assert not is_experts(torch.nn.Linear(2, 2))
    assert is_experts(model_of("dbrx").transformer.blocks[0].ffn.experts)


def test_a_pool_refuses_experts():
    adapter, base = extract(model_of("mixtral", "a"), "a"), model_of("mixtral").float()
    pool = AdapterPool(base, slots=2)
    with pytest.raises(UnsupportedError, match=r"experts\.gate_up_proj:0' is an expert; a pool"):
        pool.acquire("alice", lambda: adapter)
