"""Write docs/families.md: what adapters can do on tiny models of many families of transformers.

Each family's model is made from a small configuration with random weights, and goes through
attach, a training step, save, load, merge, unmerge, rows and detach, with the default targets and
with all-linear. `python -m docs.make_families`, in the folder above, writes the table; the tests run parts of it.
"""

import argparse
import copy
import tempfile
import warnings
from pathlib import Path

import torch
import transformers as hf
from docs.tiny_multimodal import CONFIGS, inputs_of
from torch import Tensor, nn

import veratune as vt
from veratune.errors import VeratuneError
from veratune.model_state import vectors_of

TEXT = [
    "albert",
    "apertus",
    "arcee",
    "bert",
    "bamba",
    "bert-generation",
    "big_bird",
    "biogpt",
    "blenderbot",
    "bloom",
    "camembert",
    "codegen",
    "cohere",
    "cohere2",
    "convbert",
    "cpmant",
    "ctrl",
    "data2vec-text",
    "deberta",
    "deberta-v2",
    "deepseek_v2",
    "deepseek_v3",
    "distilbert",
    "electra",
    "ernie",
    "ernie4_5",
    "esm",
    "exaone4",
    "falcon",
    "falcon_h1",
    "falcon_mamba",
    "flaubert",
    "fnet",
    "funnel",
    "gemma",
    "gemma2",
    "gemma3_text",
    "glm",
    "glm4",
    "gpt2",
    "gpt_bigcode",
    "gpt_neo",
    "gpt_neox",
    "gpt_oss",
    "gptj",
    "granite",
    "granitemoe",
    "helium",
    "jamba",
    "layoutlm",
    "lfm2",
    "llama",
    "longformer",
    "longt5",
    "luke",
    "mamba",
    "mamba2",
    "mbart",
    "megatron-bert",
    "minimax",
    "mistral",
    "mixtral",
    "mobilebert",
    "modernbert",
    "mpnet",
    "mpt",
    "mt5",
    "mvp",
    "nemotron",
    "nystromformer",
    "olmo",
    "olmo2",
    "olmoe",
    "opt",
    "pegasus",
    "persimmon",
    "phi",
    "phi3",
    "phimoe",
    "plbart",
    "prophetnet",
    "qwen2",
    "qwen2_moe",
    "qwen3",
    "qwen3_moe",
    "qwen3_5_text",
    "qwen3_next",
    "rembert",
    "roberta",
    "roberta-prelayernorm",
    "roformer",
    "rwkv",
    "seed_oss",
    "smollm3",
    "squeezebert",
    "stablelm",
    "starcoder2",
    "switch_transformers",
    "t5",
    "umt5",
    "xglm",
    "xlm",
    "xlm-roberta",
    "xlnet",
    "xmod",
    "zamba2",
]
VISION = [
    "beit",
    "convnext",
    "convnextv2",
    "data2vec-vision",
    "deit",
    "dinov2",
    "dinov2_with_registers",
    "ijepa",
    "mobilevit",
    "poolformer",
    "pvt",
    "regnet",
    "resnet",
    "segformer",
    "swin",
    "swinv2",
    "vit",
    "vit_mae",
    "vit_msn",
]
FAMILIES = TEXT + VISION + list(CONFIGS)

STEPS = ("attach", "step", "save, load", "merge", "rows", "detach")

# Sizes by the names that configurations have for them.
_SIZES: dict[str, object] = {
    "vocab_size": 99, "hidden_size": 32, "d_model": 32, "n_embd": 32, "dim": 32, "emb_dim": 32,
    "embedding_size": 32, "intermediate_size": 48, "ffn_dim": 48, "d_ff": 48, "hidden_dim": 48,
    "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "n_inner": 48, "moe_intermediate_size": 48,
    "num_hidden_layers": 2, "num_layers": 2, "n_layer": 2, "n_layers": 2, "encoder_layers": 2,
    "decoder_layers": 2, "num_decoder_layers": 2, "num_encoder_layers": 2,
    "num_attention_heads": 4, "num_heads": 4, "n_head": 4, "n_heads": 4,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "d_kv": 8, "max_position_embeddings": 64, "n_positions": 64, "n_ctx": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "rotary_dim": 4,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "initializer_range": 0.2, "image_size": 32, "patch_size": 8,
}  # fmt: skip
_DROPOUT = ("dropout", "drop_rate", "pdrop", "layerdrop")


def tiny(family: str) -> nn.Module:
    """A small model of a family, in evaluation mode."""
    torch.manual_seed(0)
    if family in CONFIGS:
        return hf.AutoModel.from_config(CONFIGS[family]()).eval()
    kind = hf.models.auto.configuration_auto.CONFIG_MAPPING[family]
    default = kind()
    sizes = {
        key: value
        for key, value in _SIZES.items()
        if isinstance(getattr(default, key, None), int | float)
    }
    sizes |= _SPECIAL.get(family, {})
    sizes = {key: value for key, value in sizes.items() if value is not None}
    config = kind(**sizes)
    for key, value in vars(config).items():
        if isinstance(value, float) and any(word in key for word in _DROPOUT):
            setattr(config, key, 0.0)
    torch.manual_seed(0)
    return hf.AutoModel.from_config(config).eval()


_DELTA: dict[str, object] = {
    "layer_types": ["linear_attention", "full_attention"], "linear_num_value_heads": 4,
    "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
}  # fmt: skip
_SPECIAL: dict[str, dict[str, object]] = {
    "deberta-v2": {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8},
    "deepseek_v2": {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8,
                    "qk_rope_head_dim": 8, "v_head_dim": 8, "num_key_value_heads": 4,
                    "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "head_dim": 8,
                    "num_experts_per_tok": 2},
    "deepseek_v3": {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8,
                    "qk_rope_head_dim": 8, "v_head_dim": 8, "num_key_value_heads": 4,
                    "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1},
    "esm": {"vocab_size": 99, "pad_token_id": 0, "mask_token_id": 3},
    "falcon": {"head_dim": None},
    "mobilebert": {"true_hidden_size": 32, "intra_bottleneck_size": 32, "embedding_size": 32,
                   "hidden_size": 32},
    "prophetnet": {"num_hidden_layers": None, "num_encoder_layers": 2, "num_decoder_layers": 2,
                   "num_encoder_attention_heads": 4, "num_decoder_attention_heads": 4},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 4,
                  "mamba_chunk_size": 8},
    "bamba": {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 4, "mamba_n_groups": 1,
              "mamba_chunk_size": 8, "attn_layer_indices": [1]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2,
              "expert_layer_offset": 1, "mamba_d_state": 4, "mamba_dt_rank": 4},
    "qwen3_next": {**_DELTA, "shared_expert_intermediate_size": 16},
    "qwen3_5_text": _DELTA,
    "rwkv": {"attention_hidden_size": 32, "num_attention_heads": None, "use_cache": False},
    "longformer": {"attention_window": 4},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2},
    "mamba": {"state_size": 4}, "falcon_mamba": {"state_size": 4},
    "mamba2": {"num_heads": 8, "head_dim": 8, "state_size": 4, "n_groups": 1},
    "squeezebert": {"embedding_size": 32},
    "funnel": {"block_sizes": [1, 1], "num_decoder_layers": 1, "d_head": 8, "d_inner": 48,
               "num_hidden_layers": None, "num_blocks": None, "architectures": ["FunnelModel"]},
    "xlnet": {"d_inner": 48, "d_head": 8, "max_position_embeddings": None},
    "convnext": {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2},
    "convnextv2": {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2},
    "resnet": {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]},
    "regnet": {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "groups_width": 8},
    "swin": {"embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4], "window_size": 4, "patch_size": 4},
    "swinv2": {"embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4], "window_size": 4, "patch_size": 4},
    "xmod": {"default_language": "en_XX"},
}  # fmt: skip


def batch(model: nn.Module, family: str) -> dict[str, Tensor]:
    """Four different inputs for a model."""
    if family in CONFIGS:
        return inputs_of(family)
    generator = torch.Generator().manual_seed(1)
    if family in VISION:
        return {"pixel_values": torch.randn(4, 3, 32, 32, generator=generator)}
    tokens = torch.randint(3, 99, (4, 8), generator=generator)
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    if getattr(model.config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = tokens.flip(1)
    return inputs


def first_output(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """The first tensor that the model returns; of two towers, both embeddings.

    Seeds are fixed: vit_mae masks at random.
    """
    torch.manual_seed(2)
    out = model(**inputs)
    if "image_embeds" in out:  # out[0] compares every text with every image
        return torch.cat([out.text_embeds, out.image_embeds], -1)
    return out[0]


def try_family(family: str, targets: str | None) -> dict[str, str]:
    """Take one family through every step.

    Returns:
        For each step "yes", "refused" (with the reason behind it), or an error; "layers" is the
        number of adapted matrices and "names" the last words of their names.
    """
    model = tiny(family)
    inputs, plain = batch(model, family), copy.deepcopy(model)
    out: dict[str, str] = {}
    try:
        _through(model, plain, inputs, targets, out)
    except VeratuneError as error:
        out[_next(out)] = f"refused: {error}"
    except AssertionError as error:
        out[_next(out)] = f"wrong: {error}".splitlines()[0]
    return out


def _next(out: dict[str, str]) -> str:
    return next(step for step in STEPS if step not in out)


def _through(
    model: nn.Module,
    plain: nn.Module,
    inputs: dict[str, Tensor],
    targets: str | None,
    out: dict[str, str],
) -> None:
    with torch.no_grad():  # with gradients, attention may take another kernel
        before = first_output(model, inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # left-out layers are in the number of layers
        vt.attach(model, vt.VeraConfig(rank=4, targets=targets), "a")
        vt.attach(model, vt.VeraConfig(rank=4, targets=targets, seed=1), "b", trainable=False)
    layers = [vectors.layer for vectors in vectors_of(model, "a")]
    out["layers"] = str(len(layers))
    out["names"] = ", ".join(sorted({name.rpartition(".")[2] for name in layers}))
    with torch.no_grad():
        close(first_output(model, inputs), before)
    out["attach"] = "yes"
    vt.use(model, "a")
    first_output(model, inputs).square().mean().backward()
    trained = [p for vectors in vectors_of(model, "a") for p in vectors.parameters()]
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in trained), "no gradient"
    out["step"] = "yes"
    for seed, name in enumerate("ab"):
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for vectors in vectors_of(model, name):
                for p in vectors.parameters():
                    p.add_(torch.randn(p.shape, generator=generator) * 0.3)
    with torch.no_grad():
        alone = {}
        for name in ("a", "b", None):
            vt.use(model, name)
            alone[name] = first_output(model, inputs)
        with tempfile.TemporaryDirectory() as folder:
            vt.use(model, "a")
            vt.save(model, Path(folder) / "a.safetensors")
            vt.load(plain, Path(folder) / "a.safetensors")
        close(first_output(plain, inputs), alone["a"])
        out["save, load"] = "yes"
        vt.merge(model, "a")
        close(first_output(model, inputs), alone["a"])
        vt.unmerge(model)
        vt.use(model, None)
        assert torch.equal(first_output(model, inputs), alone[None]), "unmerge changed the base"
        out["merge"] = "yes"
        names = ["a", "b", None, "b"]
        try:
            with vt.rows(model, names):
                mixed = first_output(model, inputs)
            axis = 1 if mixed.shape[0] != 4 else 0
            for i, name in enumerate(names):
                close(mixed.select(axis, i), alone[name].select(axis, i))
            out["rows"] = "yes"
        except vt.VeratuneError as error:
            out["rows"] = f"refused: {error}"
        vt.detach(model)
        assert torch.equal(first_output(model, inputs), before), "detach changed the base"
    out["detach"] = "yes"


def close(a: Tensor, b: Tensor) -> None:
    """Assert that two outputs agree to rounding, relative to their size."""
    error = (a - b).abs().max() / b.abs().max().clamp(min=1e-6)
    assert error < 2e-3, f"outputs differ by {error:.1e}"


def table(families: list[str]) -> str:
    """The page."""
    lines = [
        "# Families", "",
        "Tiny models with random weights, made by `docs/make_families.py`. \"yes\" means exact: "
        "loaded, merged and mixed outputs equal those of the adapter alone, and unmerge and detach "
        "give back every bit. \"refused\" means an error that names the layer. "
        "\"model\" means that the tiny model itself does not run, or that its output does not read "
        "the adapted layer (SqueezeBERT's pooler).", "",
        "| family | targets | adapted | layers | " + " | ".join(STEPS) + " |",
        "|---|---|---|---|" + "---|" * len(STEPS),
    ]  # fmt: skip
    for family in families:
        for targets in (None, "all-linear"):
            try:
                found = try_family(family, targets)
            except Exception as error:  # the model itself does not run
                found = {"attach": f"model: {type(error).__name__}: {str(error)[:60]}"}
            print(family, targets, found, flush=True)
            cells = [found.get(step, "-").split(":")[0] for step in STEPS]
            names = found.get("names", "-").replace("|", "")
            row = [family, targets or "default", names, found.get("layers", "-"), *cells]
            lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("families", nargs="*", default=FAMILIES, help="default: all")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "families.md")
    chosen = parser.parse_args()
    chosen.out.write_text(table(list(chosen.families)))
