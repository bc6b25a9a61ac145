"""The parts of fused projections: one weight whose row blocks are q, k and v, or gate and up.

Only projections whose parts are whole blocks of rows have parts here. GPT-NeoX, BLOOM, Falcon and
DeBERTa v1 interleave q, k and v head by head: they are adapted as one matrix.
"""

from torch import nn

from veratune.layers.vectors import Part

QKV = ("q", "k", "v")

# Last component of the layer's path -> its parts.
# GPT-2; timm and DINO; ModernBERT, MPT; Phi-3; Phi-3, GLM.
FUSED: dict[str, tuple[str, ...]] = {
    "c_attn": QKV,
    "qkv": QKV,
    "Wqkv": QKV,
    "qkv_proj": QKV,
    "gate_up_proj": ("gate", "up"),
}


def fused_parts(
    name: str, parent: nn.Module | None, rows: int, columns: int
) -> tuple[Part, ...] | None:
    """Find the parts of a fused projection.

    Args:
        name: Path of the layer.
        parent: The module that holds it; its config gives the head counts where k and v are
            smaller.
        rows: m, output features.
        columns: n, input features.

    Returns:
        The parts; None if the layer is no fused projection of a known name and size.
    """
    last = name.rpartition(".")[2]
    names = FUSED.get(last)
    if names is None:
        return None
    if last == "c_attn" and rows == 2 * columns:  # GPT-2's cross-attention: q is a layer of its own
        names = ("k", "v")
    sizes = _sizes(names, rows, columns, parent)
    if sizes is None:
        return None
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return tuple(
        Part(n, "weight", start, start + size, columns)
        for n, start, size in zip(names, starts, sizes, strict=True)
    )


def attention_parts(module: nn.MultiheadAttention) -> tuple[Part, ...]:
    """The projections of torch's attention block: q, k, v (in one weight or three) and out_proj."""
    width = module.embed_dim
    if module.in_proj_weight is not None:
        parts = [
            Part(n, "in_proj_weight", i * width, (i + 1) * width, width) for i, n in enumerate(QKV)
        ]
    else:
        sizes = (width, module.kdim, module.vdim)
        parts = [
            Part(n, f"{n}_proj_weight", 0, width, size) for n, size in zip(QKV, sizes, strict=True)
        ]
    return (*parts, Part("out_proj", "out_proj.weight", 0, width, width))


def _sizes(
    names: tuple[str, ...], rows: int, columns: int, parent: nn.Module | None
) -> list[int] | None:
    """Output features of each part."""
    if names != QKV or rows == 3 * columns:
        return [rows // len(names)] * len(names) if rows % len(names) == 0 else None
    config = getattr(parent, "config", None)
    heads: int = getattr(config, "num_attention_heads", None) or 0
    groups: int = getattr(config, "num_key_value_heads", None) or heads
    if not heads or rows % (heads + 2 * groups):
        return None
    head = rows // (heads + 2 * groups)
    return [heads * head, groups * head, groups * head]
