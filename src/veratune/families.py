"""Default targets of each model family, and the output heads that `all-linear` leaves out."""

from collections.abc import Iterator

from torch import nn

from veratune.config import ALL_CONV, ALL_LINEAR

DEFAULT_TARGETS = ("query", "value")

_MLA = ("q_proj", "q_a_proj", "q_b_proj", "kv_b_proj")  # multi-head latent attention
_FUSED = ("query_key_value",)  # interleaved head by head: q and v cannot be told apart by rows
_MIXER = ("query", "value", "in_proj", "out_proj")  # state space mixers, beside attention if any
_CONV = (ALL_CONV,)

# Families whose default differs from query and value, by transformers' model_type. A word that a
# model does not have is skipped, if another one matches.
FAMILY_TARGETS: dict[str, tuple[str, ...]] = {
    "deberta": ("in_proj",),
    **dict.fromkeys(
        ("bloom", "falcon", "fuyu", "gpt_neox", "gpt_neox_japanese", "persimmon"), _FUSED
    ),
    **dict.fromkeys(
        (
            "deepseek_v2",
            "deepseek_v3",
            "deepseek_v32",
            "glm4_moe_lite",
            "glm_moe_dsa",
            "kimi_k25",
            "longcat_flash",
            "minicpm3",
            "mistral4",
            "youtu",
            "axk1",
            "axk2",
            "hy_v4",
        ),
        _MLA,
    ),
    "deepseek_v4": ("q_a_proj", "q_b_proj", "kv_proj"),
    **dict.fromkeys(
        (
            "mamba",
            "mamba2",
            "falcon_mamba",
            "jamba",
            "bamba",
            "falcon_h1",
            "granitemoehybrid",
            "nemotron_h",
            "zamba",
            "zamba2",
            "lfm2",
            "lfm2_moe",
            "lfm3",
            "recurrent_gemma",
        ),
        _MIXER,
    ),
    **dict.fromkeys(
        ("qwen3_next", "qwen3_5", "qwen3_5_moe", "qwen3_5_text", "qwen3_5_moe_text"),
        ("query", "value", "in_proj_qkvz", "in_proj_qkv", "out_proj"),
    ),
    "funnel": ("q_head", "v_head"),
    "wavlm": ("intermediate_dense", "output_dense"),  # its attention reads weights past the layers
    "rwkv": ("key", "value", "receptance", "output"),
    "xlnet": ("layer_1", "layer_2"),  # its attention holds parameters, not layers
    "jetmoe": ("kv_proj",),
    "bark": ("att_proj",),
    **dict.fromkeys(
        ("moshi", "kyutai_speech_to_text", "gemma4_vision", "gemma4_audio"),
        ("q_proj.linear", "v_proj.linear"),
    ),
    **dict.fromkeys(("fnet", "focalnet", "levit", "patchtsmixer", "swiftformer"), (ALL_LINEAR,)),
    **dict.fromkeys(("convnext", "convnextv2", "dinov3_convnext"), (ALL_LINEAR, ALL_CONV)),
    **dict.fromkeys(
        (
            "bit",
            "dac",
            "efficientnet",
            "encodec",
            "hgnet_v2",
            "mobilenet_v1",
            "mobilenet_v2",
            "mobilevitv2",
            "poolformer",
            "regnet",
            "resnet",
            "textnet",
            "univnet",
            "uvdoc",
        ),
        _CONV,
    ),
}

# The usual names of an output head, for models that do not say which module it is.
HEAD_NAMES = frozenset(
    {
        "classifier",
        "cls",
        "embed_out",
        "fc",
        "head",
        "heads",
        "lm_head",
        "output_layer",
        "output_projection",
        "prediction_head",
        "qa_outputs",
        "score",
    }
)

# The children of a multimodal model that hold its language model, in the order they are tried.
LANGUAGE_TOWERS = ("language_model", "text_model", "llm")

# The same for the image encoder.
VISION_TOWERS = ("vision_tower", "visual", "vision_model", "vision_encoder", "vision_backbone")


def model_type(model: nn.Module) -> str:
    """Return transformers' name of the model's family; "" for other models."""
    return str(getattr(getattr(model, "config", None), "model_type", ""))


def default_targets(model: nn.Module) -> tuple[str, ...]:
    """Return the default targets of a model: query and value, or what its family has instead."""
    text = getattr(getattr(model, "config", None), "text_config", None)
    for family in (model_type(model), getattr(text, "model_type", "")):
        if family in FAMILY_TARGETS:
            return FAMILY_TARGETS[family]
    return DEFAULT_TARGETS


def language_tower(model: nn.Module) -> str:
    """Return the path of a multimodal model's language model; "" for a model with one tower.

    CLIP-like models, which train two towers against each other, have no language tower.
    """
    config = getattr(model, "config", None)
    if getattr(config, "vision_config", None) is None and (
        getattr(config, "audio_config", None) is None
    ):
        return ""
    if hasattr(model, "logit_scale") or hasattr(getattr(model, "clip", None), "logit_scale"):
        return ""
    return _first(model, LANGUAGE_TOWERS)


def vision_tower(model: nn.Module) -> str:
    """Return the path of a multimodal model's image encoder; "" for a model without one."""
    return _first(model, VISION_TOWERS)


def _first(model: nn.Module, names: tuple[str, ...]) -> str:
    for path, module in model.named_modules():
        if path.rpartition(".")[2] in names and _is_inner(module):
            return path
    return ""


def _is_inner(module: nn.Module) -> bool:
    return any(True for _ in module.children())


def output_heads(model: nn.Module) -> set[str]:
    """Return the paths of a model's output heads, which `all-linear` leaves out.

    A head is the module that the model names (`get_output_embeddings`, timm's `get_classifier`),
    a linear layer whose weight is tied to an embedding, whatever stands outside a Hugging Face
    model's backbone, and otherwise a child of the model with a head's usual name.
    """
    named = {id(module) for module in _declared_heads(model)}
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    heads = {
        path
        for path, module in model.named_modules()
        if path and (id(module) in named or _weight_id(module) in embeddings)
    }
    backbone = getattr(model, "base_model_prefix", "")
    if backbone and isinstance(getattr(model, backbone, None), nn.Module):
        return heads | {path for path, _ in model.named_children() if path != backbone}
    return heads | {path for path, _ in model.named_children() if path in HEAD_NAMES}


def _declared_heads(model: nn.Module) -> Iterator[nn.Module]:
    for method in ("get_output_embeddings", "get_classifier"):
        try:
            head = getattr(model, method)()
        except (AttributeError, NotImplementedError, TypeError):
            continue
        if isinstance(head, nn.Module):
            yield head


def _weight_id(module: nn.Module) -> int:
    if isinstance(module, nn.Embedding):
        return -1
    return id(module._parameters.get("weight"))
