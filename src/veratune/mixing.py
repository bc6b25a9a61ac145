"""Mix adapters: one adapter whose ΔW is a weighted sum of the ΔW of others.

ΔW = diag(b) B diag(d) A is linear in d where A, B and b are the same, and linear in b where A, B
and d are the same. Then sum_i w_i ΔW_i is the ΔW of one adapter with d = sum_i w_i d_i (or b).
Other sums have no such adapter, and are refused.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from veratune.adapter import Adapter, check_weight_fingerprint
from veratune.basis.lora import LoraBasis
from veratune.errors import ConfigError, UnsupportedError

# Settings that say what ΔW is for given vectors. Others are a record of the training.
_SETTINGS = ("basis", "init", "sharing", "seed", "fused", "conv_layout", "vectors")


@dataclasses.dataclass(frozen=True)
class MixPart:
    """One adapter of a mix.

    Attributes:
        name: Its name, for errors.
        adapter: The adapter.
        weight: Factor of its ΔW; any finite number.
    """

    name: str
    adapter: Adapter
    weight: float


def mix(parts: Sequence[MixPart]) -> Adapter:
    """Mix adapters: ΔW = sum_i weight_i ΔW_i, exactly, as one adapter.

    Args:
        parts: The adapters, of one base model, with equal A, B, layers and ranks. Either only d is
            trained (vectors="d"), or only b (vectors="b"), or b is the same in all of them.

    Returns:
        An adapter in float32, with the task metadata that all parts have in common.

    Raises:
        ConfigError: There are no parts, or a weight is not finite.
        UnsupportedError: No one adapter is the sum: names the part and what differs.
        BaseModelError: The parts were trained on different base models.
    """
    if not parts:
        raise ConfigError("a mix wants at least one adapter")
    first = parts[0]
    for part in parts:
        if not math.isfinite(part.weight):
            raise ConfigError(
                f"the weight of {part.name!r} is {part.weight}; a finite one is wanted"
            )
        _check_linear(first, part)
    vectors = "b" if first.adapter.config.vectors == "b" else "d"
    mixed = _weighted_sum(
        [(p.adapter.b if vectors == "b" else p.adapter.d, p.weight) for p in parts]
    )
    task = {
        key: value
        for key, value in first.adapter.task.items()
        if all(part.adapter.task.get(key) == value for part in parts)
    }
    config = dataclasses.replace(first.adapter.config, dtype="float32")
    kept = {layer: vector.float() for layer, vector in first.adapter.b.items()}
    return dataclasses.replace(
        first.adapter,
        config=config,
        d={} if vectors == "b" else mixed,
        b=mixed if vectors == "b" else kept,
        task=task,
        layer_ranks=first.adapter.ranks,
    )


def _check_linear(first: MixPart, part: MixPart) -> None:
    """Raise UnsupportedError unless the sum with the first part is an adapter."""
    one, other = first.adapter, part.adapter
    pair = f"{part.name!r} and {first.name!r} cannot be mixed"
    for adapter in (one, other):
        if isinstance(adapter.bound, LoraBasis) or adapter.config.basis == "lora":
            name = first.name if adapter is one else part.name
            raise UnsupportedError(
                f"{name!r} cannot be mixed: it has LoRA matrices of its own; mix VeRA adapters"
            )
        if adapter.head:
            name = first.name if adapter is one else part.name
            raise UnsupportedError(
                f"{name!r} cannot be mixed: it has a trained head, whose output is not linear in it"
            )
    for setting in _SETTINGS:
        here, there = getattr(other.config, setting), getattr(one.config, setting)
        if here != there:
            raise UnsupportedError(
                f"{pair}: {setting} is {here!r} in the one and {there!r} in the other; "
                "equal ones are wanted"
            )
    if dict(one.shapes) != dict(other.shapes) or dict(one.kernels) != dict(other.kernels):
        raise UnsupportedError(f"{pair}: they adapt different layers; equal targets are wanted")
    if one.ranks != other.ranks:
        raise UnsupportedError(f"{pair}: their ranks differ; equal ones are wanted")
    check_weight_fingerprint(one.weight_fingerprint, other, one.base_id)
    if one.fingerprint != other.fingerprint:
        raise UnsupportedError(f"{pair}: their frozen matrices A and B differ")
    if one.config.vectors == "both" and not _equal(one.b, other.b):
        raise UnsupportedError(
            f"{pair}: b is trained in both (vectors='both'), and ΔW is linear in d only where b is "
            "the same; train adapters with --vectors d to mix them"
        )
    for key in ("system", "chat_template", "chat_template_sha256"):
        if (one.task.get(key) or "") != (other.task.get(key) or ""):
            words = "system messages" if key == "system" else "chat templates"
            raise UnsupportedError(f"{pair}: they were trained with different {words}")


def _equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one is other or all(torch.equal(one[layer], other[layer]) for layer in one)


def _weighted_sum(parts: Sequence[tuple[Mapping[str, Tensor], float]]) -> dict[str, Tensor]:
    """Sum the vectors of each layer in float64, and round once."""
    found: dict[str, Tensor] = {}
    for layer in parts[0][0]:
        total = sum(weight * vectors[layer].double() for vectors, weight in parts)
        assert isinstance(total, Tensor)
        found[layer] = total.float()
        if not torch.isfinite(found[layer]).all():
            raise UnsupportedError(
                f"the weights make the mixed vector of layer '{layer}' larger than float32 holds"
            )
    return found
