"""Which layers of a model an adapter changes: from the words of a VeraConfig to a list of sites.

Nothing here changes the model, so a model without weights (on the meta device) will do.
"""

import collections
import dataclasses
import fnmatch
import re
import sys
from collections.abc import Iterable, Iterator, Mapping

from torch import nn

from veratune.config import ALL_CONV, ALL_LINEAR, VeraConfig
from veratune.errors import ConfigError, TargetError, near
from veratune.layers.base import Part, VeraHead, VeraLayer, VeraWeightLayer
from veratune.layers.conv import check_conv, conv_part, is_conv
from veratune.layers.fused import attention_parts, fused_parts

# The field's words for a projection, and the names that model families give it: BERT, RoBERTa, ViT, DINOv2;
# Llama, Qwen, Mistral, Gemma, Phi, CLIP; DistilBERT; T5 and fused parts; DeBERTa v2; diffusers.
ROLES: dict[str, tuple[str, ...]] = {
    "query": ("query", "q_proj", "q_lin", "q", "query_proj", "to_q"),
    "key": ("key", "k_proj", "k_lin", "k", "key_proj", "to_k"),
    "value": ("value", "v_proj", "v_lin", "v", "value_proj", "to_v"),
}

DEFAULT_TARGETS = ("query", "value")

# Families whose query and value cannot be told apart by rows: the fused projection is adapted whole.
INTERLEAVED_TARGETS: dict[str, tuple[str, ...]] = {
    "deberta": ("in_proj",),
    "gpt_neox": ("query_key_value",),
    "bloom": ("query_key_value",),
    "falcon": ("query_key_value",),
}

# Between a fused layer's path and the name of its part: torch allows no module to have it in its name.
PART = ":"

_WHOLE = VeraConfig(fused="whole")
_INDEX = re.compile(r"(?:^|\.)(\d+)(?:\.|$)")


@dataclasses.dataclass(frozen=True)
class Site:
    """One matrix that an adapter changes: a layer, or a part of a fused one.

    name: the layer's path, with ":part" behind it for a part; module: the path; part: the rows; rank: r.
    """

    name: str
    module: str
    part: Part
    rank: int

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n)"""
        return self.part.out_features, self.part.in_features


def find_sites(model: nn.Module, config: VeraConfig) -> list[Site]:
    """The sites that `config` names in `model`, in the model's order.

    Raises TargetError when a target, an exclusion, a block index or a rank pattern matches nothing.
    """
    heads = [path for path, _ in find_heads(model, config.head)]
    candidates = [
        (path, part)
        for path, module in layers_of(model)
        if not any(path == head or path.startswith(head + ".") for head in heads)
        for part in parts_of(model, path, module, config)
    ]
    names = [_site_name(path, part) for path, part in candidates]
    if not names:
        raise TargetError(
            f"{type(model).__name__} has no linear layer and no convolution, and nothing else can be adapted"
        )
    targets = config.targets or default_targets(model)
    chosen = set()
    for target in targets:
        if target in (ALL_LINEAR, ALL_CONV):
            inside = _backbone(model) if target == ALL_LINEAR else ""
            found = {
                name
                for name, (_, part) in zip(names, candidates, strict=True)
                if name.startswith(inside) and bool(part.kernel) == (target == ALL_CONV)
            }
        else:
            found = {name for name in names if matches(target, name)}
        if not found:
            raise TargetError(_unmatched(model, "target", target, names))
        chosen |= found
    for pattern in config.exclude:
        found = {name for name in names if matches(pattern, name)}
        if not found:
            raise TargetError(_unmatched(model, "exclude", pattern, names))
        chosen -= found
    if config.layers is not None:
        chosen = _in_blocks(chosen, config.layers)
    if not chosen:
        raise TargetError(
            f"exclude {list(config.exclude)} leaves none of the layers that {list(targets)} matched"
        )
    for pattern in config.rank_pattern:
        if not any(matches(pattern, name) for name in chosen):
            raise TargetError(_unmatched(model, "rank_pattern", pattern, sorted(chosen)))
    sites = []
    for (path, part), name in zip(candidates, names, strict=True):
        if name in chosen:
            if part.kernel:
                module = base_module(model, path)
                check_conv(module, path, config)
                part = conv_part(module, config.conv_layout)
            sites.append(Site(name, path, part, rank_of(config, name, part.kernel)))
    return sites


def config_for_lora(model: nn.Module, config: VeraConfig, ranks: Mapping[str, int]) -> VeraConfig:
    """The config of an adapter over a LoRA, with the LoRA's layers for targets and its ranks: what a file must say of them.

    ranks: r by layer of the LoRA. Raises TargetError for a target that the LoRA does not have.
    """
    known = [
        _site_name(path, part)
        for path, module in layers_of(model)
        for part in parts_of(model, path, module, _WHOLE)
    ]
    missing = sorted(set(ranks) - set(known))
    if missing:
        raise TargetError(
            f"the LoRA has layer '{missing[0]}', {type(model).__name__} has not{near(missing[0], known)}"
        )
    chosen = list(ranks)
    if config.targets is not None:
        chosen = [
            site.name
            for site in find_sites(
                model, dataclasses.replace(config, fused="whole", rank_pattern={})
            )
        ]
        outside = next((name for name in chosen if name not in ranks), None)
        if outside is not None:
            raise TargetError(
                f"layer '{outside}' is a target, but the LoRA has no matrices for it{near(outside, ranks)}"
            )
    most = collections.Counter(ranks[name] for name in chosen).most_common(1)[0][0]
    return dataclasses.replace(
        config,
        fused="whole",
        targets=tuple(_exactly(name, known) for name in chosen),
        exclude=(),
        layers=None,
        rank=most,
        rank_pattern={_exactly(name, known): ranks[name] for name in chosen if ranks[name] != most},
    )


def _exactly(name: str, known: list[str]) -> str:
    """A word of the target language that means one site alone."""
    return name if sum(matches(name, other) for other in known) == 1 else f"re:{re.escape(name)}"


def rank_of(config: VeraConfig, name: str, kernel: tuple[int, ...] = ()) -> int:
    """The rows of A at the site called `name`: the rank, times the kernel's side in the layout "loralib".

    kernel: of a convolution; empty for other layers.
    """
    rank = next(
        (rank for pattern, rank in config.rank_pattern.items() if matches(pattern, name)),
        config.rank,
    )
    return rank * kernel[0] if kernel and config.conv_layout == "loralib" else rank


def find_heads(model: nn.Module, head: Iterable[str]) -> list[tuple[str, nn.Module]]:
    """(path, module) of each module that the config trains in full. Raises TargetError for a name that matches none."""
    out = []
    for name in head:
        walked = [
            (path, module.base if isinstance(module, VeraHead) else module)
            for path, module in _walk(model)
            if path
        ]
        whole = [
            entry for entry in walked if entry[0] == name
        ]  # a full path means that module alone
        found = whole or [entry for entry in walked if entry[0].endswith("." + name)]
        if not found:
            known = [
                path.rsplit(".", 1)[-1]
                for path, _ in _walk(model)
                if path and not _INDEX.search(path)
            ]
            raise TargetError(
                f"head {name!r} is no module of {type(model).__name__}{near(name, known)}"
            )
        out += [called for entry in found for called in _called(*entry)]
    paths = dict(out)  # names may overlap, and a module may lie inside another one
    return [
        (path, module)
        for path, module in paths.items()
        if not any(path.startswith(f"{other}.") for other in paths)
    ]


def _called(path: str, module: nn.Module) -> list[tuple[str, nn.Module]]:
    """A module, or what is inside a list or dictionary of modules, which is not called itself."""
    if not isinstance(module, nn.ModuleList | nn.ModuleDict):
        return [(path, module)]
    return [
        entry
        for name, child in module.named_children()
        for entry in _called(f"{path}.{name}", child.base if isinstance(child, VeraHead) else child)
    ]


def default_targets(model: nn.Module) -> tuple[str, ...]:
    """Query and value under whatever name the model has for them."""
    return INTERLEAVED_TARGETS.get(
        getattr(getattr(model, "config", None), "model_type", ""), DEFAULT_TARGETS
    )


def matches(pattern: str, name: str) -> bool:
    """Whether a word of the target language means the site called `name`.

    A part of a fused layer is called "layer:part"; "layer.part" means it too, and "layer" all of its parts.

    >>> matches("q_proj", "model.layers.0.self_attn.q_proj"), matches("query", "model.layers.0.self_attn.q_proj")
    (True, True)
    >>> matches("c_attn", "h.0.attn.c_attn:q"), matches("c_attn.q", "h.0.attn.c_attn:q"), matches("proj", "h.0.q_proj")
    (True, True, False)
    >>> matches("h.0.*", "h.0.attn.c_attn:q"), matches(r"re:h\\.[02]\\..*:[qv]", "h.1.attn.c_attn:q")
    (True, False)
    """
    if pattern.startswith("re:"):
        try:
            return re.fullmatch(pattern[3:], name) is not None
        except re.error as error:
            raise ConfigError(f"{pattern!r} is not a regular expression: {error}") from None
    if any(sign in pattern for sign in "*?["):
        return fnmatch.fnmatchcase(name, pattern)
    layer = name.partition(PART)[0]
    dotted = name.replace(PART, ".")
    if any(form == pattern or form.endswith("." + pattern) for form in (name, dotted, layer)):
        return True
    return dotted.rpartition(".")[2] in ROLES.get(pattern, ())


def layers_of(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(path, layer as it came in) of everything that can be adapted, shared layers once."""
    for path, module in _walk(model):
        base = module.base if isinstance(module, VeraWeightLayer) else module
        if path and (is_attention(base) or is_linear(base) or is_conv(base)):
            yield path, base


def parts_of(
    model: nn.Module, path: str, module: nn.Module, config: VeraConfig
) -> tuple[Part, ...]:
    """The matrices of a layer."""
    if isinstance(module, nn.MultiheadAttention):
        return attention_parts(module)
    if is_conv(module):
        return (conv_part(module, "matrix"),)
    rows, columns = linear_shape(module)
    whole = (Part("", "weight", 0, rows, columns),)
    if config.fused == "whole":
        return whole
    parent = model.get_submodule(path.rpartition(".")[0])
    return fused_parts(path, parent, rows, columns) or whole


def is_linear(module: nn.Module) -> bool:
    """nn.Linear and what derives from it (quantized ones too), or Hugging Face's Conv1D."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


def is_attention(module: nn.Module) -> bool:
    return isinstance(module, nn.MultiheadAttention)


def is_conv1d(module: nn.Module) -> bool:
    """Whether this is transformers' Conv1D, asked without importing transformers."""
    known = sys.modules.get("transformers.pytorch_utils")
    return known is not None and isinstance(module, known.Conv1D)


def linear_shape(module: nn.Module) -> tuple[int, int]:
    """(m, n)"""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    return module.nf, module.nx  # type: ignore[return-value]


def _walk(
    module: nn.Module, path: str = "", seen: set[int] | None = None
) -> Iterator[tuple[str, nn.Module]]:
    """named_modules, but an adapted layer and an attention block count as one module."""
    seen = set() if seen is None else seen
    if id(module) in seen:
        return
    seen.add(id(module))
    yield path, module
    if is_attention(module) or isinstance(module, VeraWeightLayer):
        return
    children = (
        module.base.named_children() if isinstance(module, VeraHead) else module.named_children()
    )
    for name, child in children:
        yield from _walk(child, f"{path}.{name}" if path else name, seen)


def base_module(model: nn.Module, path: str) -> nn.Module:
    """The module at a path, as it was before any adapter."""
    module = model.get_submodule(path)
    return module.base if isinstance(module, VeraLayer) else module


def _backbone(model: nn.Module) -> str:
    """The prefix of a Hugging Face model's own backbone: its output head stands outside. "" for other models."""
    prefix = getattr(model, "base_model_prefix", "")
    return f"{prefix}." if prefix and hasattr(model, prefix) else ""


def _site_name(path: str, part: Part) -> str:
    return f"{path}{PART}{part.name}" if part.name else path


def _in_blocks(names: set[str], layers: tuple[int, ...]) -> set[str]:
    block = {name: int(found.group(1)) for name in names if (found := _INDEX.search(name))}
    missing = sorted(set(layers) - set(block.values()))
    if missing:
        raise TargetError(
            f"layers names the blocks {missing}; the model's are {min(block.values(), default=0)} to {max(block.values(), default=0)}"
        )
    return {name for name in names if block.get(name) in layers}


def _unmatched(model: nn.Module, setting: str, pattern: str, names: list[str]) -> str:
    last = {name.rpartition(".")[2] for name in names}
    near_by = near(
        pattern,
        last
        | {".".join(name.split(".")[-2:]) for name in names}
        | (set(ROLES) | {ALL_LINEAR, ALL_CONV}) - {pattern},
    )
    known = near_by or f"; its layers are called {', '.join(sorted(last)[:12])}"
    for path, module in _walk(model):
        if (
            path
            and (path == pattern or path.endswith("." + pattern))
            and not is_linear(module)
            and not is_conv(module)
        ):
            kind = f"{setting} {pattern!r} is a {type(module).__name__} of {type(model).__name__}"
            return f"{kind}; only linear layers and convolutions can be adapted{known}"
    return f"{setting} {pattern!r} matches no layer of {type(model).__name__}{known}"
