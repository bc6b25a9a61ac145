"""Which layers of a model an adapter changes: from the words of a VeraConfig to a list of sites.

Nothing here changes the model, so a model without weights (on the meta device) will do.
"""

import collections
import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import cast

from torch import nn

from veratune.config import ALL_CONV, ALL_LINEAR, CONNECTOR, VISION_TOWER, VeraConfig
from veratune.errors import TargetError, near
from veratune.families import (
    DEFAULT_TARGETS,
    default_targets,
    language_tower,
    output_heads,
    vision_tower,
)
from veratune.layers.conv import ConvModule, check_conv, conv_part
from veratune.layers.experts import check_experts, expert_parts, is_experts
from veratune.layers.fused import attention_parts, fused_parts
from veratune.layers.head import VeraHead
from veratune.layers.kinds import check_weight, is_attention, is_conv, is_linear, linear_shape
from veratune.layers.vectors import Part
from veratune.layers.weight_layer import VeraWeightLayer
from veratune.layers.wrapper import VeraLayer
from veratune.patterns import PART, ROLES, exact_pattern, matches

_LISTED = 12  # layer names in an error message
_INDEX = re.compile(r"(?:^|\.)(\d+)(?:\.|$)")


@dataclasses.dataclass(frozen=True)
class Site:
    """One matrix that an adapter changes: a layer, or a part of a fused one.

    Attributes:
        name: The layer's path; for a part, with ":part" behind it.
        module: The layer's path.
        part: The rows of the layer's weight.
        rank: r, the rows of A.
    """

    name: str
    module: str
    part: Part
    rank: int

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n): output and input size."""
        return self.part.out_features, self.part.in_features


def find_sites(model: nn.Module, config: VeraConfig) -> list[Site]:
    """Return the sites that `config` selects in `model`, in the model's order.

    Args:
        model: Any module; weights on the meta device are enough.
        config: Its targets, exclude, layers, rank and rank_pattern are read.

    Raises:
        TargetError: A target, an exclusion, a block index or a rank pattern matches nothing.
    """
    candidates = _candidates(model, config)
    names = list(candidates)
    if not names:
        raise TargetError(
            f"{type(model).__name__} has no linear layer and no convolution, and nothing else "
            "can be adapted"
        )
    chosen = _match_targets(model, config, candidates)
    for pattern in config.exclude:
        excluded = {name for name in names if matches(pattern, name)}
        if not excluded:
            raise TargetError(_unmatched(model, "exclude", pattern, names))
        chosen -= excluded
    if config.layers is not None:
        chosen = _in_blocks(chosen, config.layers)
    if not chosen:
        targets = config.targets or default_targets(model)
        raise TargetError(
            f"exclude {list(config.exclude)} leaves none of the layers that {list(targets)} matched"
        )
    for pattern in config.rank_pattern:
        if not any(matches(pattern, name) for name in chosen):
            raise TargetError(_unmatched(model, "rank_pattern", pattern, sorted(chosen)))
    return [
        _site(model, config, name, path, part, rank_of(config, name, part.kernel))
        for name, (path, part) in candidates.items()
        if name in chosen
    ]


def named_sites(model: nn.Module, config: VeraConfig, ranks: Mapping[str, int]) -> list[Site]:
    """Return the sites with the given names, in the model's order; no pattern is evaluated.

    A name that the model lacks is left out: the caller compares.

    Args:
        model: Any module.
        config: Its `fused` and `conv_layout` are read.
        ranks: The rank of each site, by its name.
    """
    candidates = _candidates(model, dataclasses.replace(config, head=()))
    return [
        _site(model, config, name, path, part, ranks[name])
        for name, (path, part) in candidates.items()
        if name in ranks
    ]


def config_for_lora(model: nn.Module, config: VeraConfig, ranks: Mapping[str, int]) -> VeraConfig:
    """Return the config of an adapter over a LoRA: the LoRA's layers as targets, with its ranks.

    Args:
        model: The model that the LoRA fits.
        config: The settings; targets=None takes every layer of the LoRA.
        ranks: r of each layer of the LoRA.

    Raises:
        TargetError: The model lacks a layer of the LoRA, or the LoRA lacks a target.
    """
    known = [
        _site_name(path, part)
        for path, module in layers_of(model)
        for part in parts_of(model, path, module, VeraConfig(fused="whole"))
    ]
    missing = sorted(set(ranks) - set(known))
    if missing:
        raise TargetError(
            f"the LoRA has layer '{missing[0]}', {type(model).__name__} has not"
            f"{near(missing[0], known)}"
        )
    chosen = list(ranks)
    if config.targets is not None:
        whole = dataclasses.replace(config, fused="whole", rank_pattern={})
        chosen = [site.name for site in find_sites(model, whole)]
        outside = next((name for name in chosen if name not in ranks), None)
        if outside is not None:
            raise TargetError(
                f"layer '{outside}' is a target, but the LoRA has no matrices for it"
                f"{near(outside, ranks)}"
            )
    most = collections.Counter(ranks[name] for name in chosen).most_common(1)[0][0]
    return dataclasses.replace(
        config,
        fused="whole",
        targets=tuple(exact_pattern(name, known) for name in chosen),
        exclude=(),
        layers=None,
        rank=most,
        rank_pattern={
            exact_pattern(name, known): ranks[name] for name in chosen if ranks[name] != most
        },
    )


def rank_of(config: VeraConfig, name: str, kernel: tuple[int, ...] = ()) -> int:
    """Return the rows of A at the site called `name`.

    Args:
        config: Its rank and rank_pattern; conv_layout="loralib" multiplies by the kernel's side.
        name: The site.
        kernel: The kernel of a convolution; empty for other layers.
    """
    rank = next(
        (rank for pattern, rank in config.rank_pattern.items() if matches(pattern, name)),
        config.rank,
    )
    return rank * kernel[0] if kernel and config.conv_layout == "loralib" else rank


def find_heads(model: nn.Module, head: Iterable[str]) -> list[tuple[str, nn.Module]]:
    """Return (path, module) of each module that the config trains in full.

    Args:
        model: Any module.
        head: Paths, or ends of paths; a full path means that module alone.

    Raises:
        TargetError: A name matches no module.
    """
    out = []
    walked = [
        (path, module.base if isinstance(module, VeraHead) else module)
        for path, module in _walk(model)
        if path
    ]
    for name in head:
        whole = [entry for entry in walked if entry[0] == name]
        matched = whole or [entry for entry in walked if entry[0].endswith("." + name)]
        if not matched:
            known = [path.rsplit(".", 1)[-1] for path, _ in walked if not _INDEX.search(path)]
            raise TargetError(
                f"head {name!r} is no module of {type(model).__name__}{near(name, known)}"
            )
        out += [leaf for entry in matched for leaf in _callable_modules(*entry)]
    paths = dict(out)  # names may overlap, and a module may lie inside another one
    return [
        (path, module)
        for path, module in paths.items()
        if not any(path.startswith(f"{other}.") for other in paths)
    ]


def layers_of(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield (path, layer before any adapter) of everything that can be adapted.

    A layer that stands in several places is yielded once.
    """
    for path, module in _walk(model):
        base = module.base if isinstance(module, VeraWeightLayer) else module
        if path and (is_attention(base) or is_linear(base) or is_conv(base) or is_experts(base)):
            yield path, base


def parts_of(
    model: nn.Module, path: str, module: nn.Module, config: VeraConfig
) -> tuple[Part, ...]:
    """Return the matrices of a layer: one, or one for each part of a fused projection."""
    if isinstance(module, nn.MultiheadAttention):
        return attention_parts(module)
    if is_conv(module):
        return (conv_part(cast(ConvModule, module), "matrix"),)
    if is_experts(module):
        return expert_parts(module)
    out_features, in_features = linear_shape(module)
    whole = (Part("", "weight", 0, out_features, in_features),)
    if config.fused == "whole":
        return whole
    parent = model.get_submodule(path.rpartition(".")[0])
    return fused_parts(path, parent, out_features, in_features) or whole


def left_out(model: nn.Module, sites: Iterable[Site]) -> tuple[list[str], float]:
    """Return the weight matrices that sites leave out, and their share of all weights.

    Embeddings and output heads do not count: they are no layers to adapt.

    Args:
        model: The model before the adapter of these sites is attached.
        sites: The adapted matrices.

    Returns:
        (paths of the parameters, share of the model's parameters between 0 and 1).
    """
    adapted = {f"{site.module}.{site.part.parameter}" for site in sites}
    heads = output_heads(model)
    total = sum(p.numel() for p in model.parameters())
    missing: dict[str, int] = {}
    for path, module in model.named_modules():
        if (
            isinstance(module, nn.Embedding | VeraLayer)
            or _within(path, heads)
            or ".vera." in f".{path}."
        ):
            continue
        plain = path.removesuffix(".base") if path.endswith(".base") else path
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.dim() > 1 and f"{plain}.{name}" not in adapted:
                missing[f"{plain}.{name}"] = parameter.numel()
    return list(missing), sum(missing.values()) / max(total, 1)


def base_module(model: nn.Module, path: str) -> nn.Module:
    """Return the module at a path, as it was before any adapter."""
    module = model.get_submodule(path)
    return module.base if isinstance(module, VeraLayer) else module


def _candidates(model: nn.Module, config: VeraConfig) -> dict[str, tuple[str, Part]]:
    """(path, part) of every matrix that can be adapted, by site name, without the heads."""
    heads = [path for path, _ in find_heads(model, config.head)]
    return {
        _site_name(path, part): (path, part)
        for path, module in layers_of(model)
        if not _within(path, heads)
        for part in parts_of(model, path, module, config)
    }


def _site(
    model: nn.Module, config: VeraConfig, name: str, path: str, part: Part, rank: int
) -> Site:
    module = base_module(model, path)
    check_weight(module, part.parameter, path)
    if part.kernel:
        check_conv(module, path, config)
        part = conv_part(cast(ConvModule, module), config.conv_layout)
    elif part.expert is not None:
        check_experts(module, path)
    return Site(name, path, part, rank)


def _match_targets(
    model: nn.Module, config: VeraConfig, candidates: Mapping[str, tuple[str, Part]]
) -> set[str]:
    """The names that the targets match. The default looks at the language tower only."""
    if config.targets is None:
        return _match_default(model, candidates)
    chosen: set[str] = set()
    for target in config.targets:
        matched = _match_word(model, target, candidates)
        if not matched:
            raise TargetError(_unmatched(model, "target", target, list(candidates)))
        chosen |= matched
    return chosen


def _match_default(model: nn.Module, candidates: Mapping[str, tuple[str, Part]]) -> set[str]:
    targets, tower = default_targets(model), language_tower(model)
    inside = {
        name: entry for name, entry in candidates.items() if not tower or _within(name, [tower])
    }
    matched = {target: _match_word(model, target, inside) for target in targets}
    missing = [target for target in targets if not matched[target]]
    if missing and (targets == DEFAULT_TARGETS or len(missing) == len(targets)):
        raise TargetError(
            f"the default targets {list(targets)} do not fit {type(model).__name__}: it has no "
            f"{missing[0]!r}; name its layers in targets, or use targets='all-linear'. Its layers "
            f"are {_layer_names(inside)}"
        )
    return set().union(*matched.values())


def _match_word(
    model: nn.Module, target: str, candidates: Mapping[str, tuple[str, Part]]
) -> set[str]:
    """The names that one word matches; words for kinds of layers leave output heads out."""
    if target == VISION_TOWER:
        tower = vision_tower(model)
        return {
            name
            for name, (path, _) in candidates.items()
            if tower
            and _within(path, [tower])
            and any(matches(role, name) for role in DEFAULT_TARGETS)
        }
    if target not in (ALL_LINEAR, ALL_CONV, CONNECTOR):
        return {name for name in candidates if matches(target, name)}
    outside = output_heads(model)
    if target == CONNECTOR:
        towers = {language_tower(model), vision_tower(model)}
        if "" in towers:
            return set()
        outside |= towers
    return {
        name
        for name, (path, part) in candidates.items()
        if bool(part.kernel) == (target == ALL_CONV) and not _within(path, outside)
    }


def _within(path: str, outer: Iterable[str]) -> bool:
    return any(path == other or path.startswith(other + ".") for other in outer)


def _callable_modules(path: str, module: nn.Module) -> list[tuple[str, nn.Module]]:
    """A module, or what is inside a list or dictionary of modules, which is not called itself."""
    if not isinstance(module, nn.ModuleList | nn.ModuleDict):
        return [(path, module)]
    return [
        leaf
        for name, child in module.named_children()
        for leaf in _callable_modules(
            f"{path}.{name}", child.base if isinstance(child, VeraHead) else child
        )
    ]


def _walk(
    module: nn.Module, path: str = "", seen: set[int] | None = None
) -> Iterator[tuple[str, nn.Module]]:
    """named_modules, but an adapted layer and an attention block count as one module."""
    seen = set() if seen is None else seen
    if id(module) in seen:
        return
    seen.add(id(module))
    yield path, module
    if is_attention(module) or is_experts(module) or isinstance(module, VeraWeightLayer):
        return
    children = (
        module.base.named_children() if isinstance(module, VeraHead) else module.named_children()
    )
    for name, child in children:
        yield from _walk(child, f"{path}.{name}" if path else name, seen)


def _site_name(path: str, part: Part) -> str:
    if part.expert is not None:
        return f"{path}.{part.parameter}{PART}{part.name}"
    return f"{path}{PART}{part.name}" if part.name else path


def _in_blocks(names: set[str], layers: tuple[int, ...]) -> set[str]:
    block = {name: int(match.group(1)) for name in names if (match := _INDEX.search(name))}
    missing = sorted(set(layers) - set(block.values()))
    if missing:
        first, last = min(block.values(), default=0), max(block.values(), default=0)
        raise TargetError(f"layers names the blocks {missing}; the model's are {first} to {last}")
    return {name for name in names if block.get(name) in layers}


def _unmatched(model: nn.Module, setting: str, pattern: str, names: Sequence[str]) -> str:
    """The message for a pattern that matches nothing: near names, or the layers there are."""
    last = {name.rpartition(".")[2] for name in names}
    ends = {".".join(name.split(".")[-2:]) for name in names}
    words = (set(ROLES) | {ALL_LINEAR, ALL_CONV, VISION_TOWER, CONNECTOR}) - {pattern}
    known = near(pattern, last | ends | words) or f"; its layers are called {_layer_names(names)}"
    for path, module in _walk(model):
        if path and _within_end(path, pattern) and not is_linear(module) and not is_conv(module):
            kind = f"{setting} {pattern!r} is a {type(module).__name__} of {type(model).__name__}"
            return f"{kind}; only linear layers and convolutions can be adapted{known}"
    return f"{setting} {pattern!r} matches no layer of {type(model).__name__}{known}"


def _within_end(path: str, end: str) -> bool:
    return path == end or path.endswith("." + end)


def _layer_names(names: Iterable[str]) -> str:
    last = sorted({name.rpartition(".")[2] for name in names})
    more = f" and {len(last) - _LISTED} more" if len(last) > _LISTED else ""
    return ", ".join(last[:_LISTED]) + more
