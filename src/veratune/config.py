"""VeraConfig: everything that defines an adapter besides its trained vectors."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal, get_args

from veratune.errors import ConfigError, near

Init = Literal["kaiming_uniform", "kaiming_normal", "uniform"]
Sharing = Literal["shared", "per_shape", "unique"]
BasisKind = Literal["random", "peft", "monarch", "lora", "principal"]
Vectors = Literal["both", "d", "b"]
Fused = Literal["parts", "whole"]
Dtype = Literal["float32", "bfloat16", "float16"]
ConvLayout = Literal["matrix", "loralib"]
Plan = Literal["auto", "factored", "projected", "merged", "dense"]
PLANS = get_args(Plan)[1:]

ALL_LINEAR = "all-linear"
ALL_CONV = "all-conv"
VISION_TOWER = "vision-tower"
CONNECTOR = "connector"


@dataclasses.dataclass(frozen=True, kw_only=True)
class VeraConfig:
    """How a model is adapted: y = W x + b * (B (d * (A x))).

    Args:
        rank: r, the rows of A and the columns of B. VeRA wants it high: 256 to 1024.
        targets: the layers to adapt. Each entry is a layer's name or the end of one ("q_proj",
            "c_attn.q"), a glob ("*.attn.*"), a regular expression for the whole name
            ("re:.*[qv]_proj"), or one of the words "query", "key", "value", which stand for that
            projection under any family's name for it. "all-linear" is every linear layer but the
            output head, "all-conv" every convolution, "vision-tower" query and value of a
            multimodal model's image encoder, "connector" the linear layers between its towers.
            None: query and value, in a multimodal model those of its language model.
        exclude: layers left out, in the same language.
        layers: indices of the blocks to adapt (the first number in a layer's name). None: all.
        rank_pattern: another rank for the layers that a pattern matches; the first match counts.
        vectors: "both", or only "d" (b stays 1) or only "b" (d stays 1): the paper's Table 6a.
        d_init: start value of d. None: 0.1, or 0 with vectors="d", so that ΔW starts at 0 either
            way; 1 over a LoRA, where b starts at 1 too and ΔW is the LoRA's.
        dropout: probability with which an input of the adapter is dropped in training, in [0, 1).
        basis: "random" (full matrices of the counter-based generator), "monarch" (small blocks of
            it, which multiply in a fraction of the work), "peft" (what Hugging Face PEFT draws),
            "principal" (the leading singular vectors of each layer's frozen weight, recomputed from
            the base model) or "lora" (A and B of a trained LoRA, which `attach` is given; targets
            None are then all its layers, and the rank is its own).
        init: distribution of A and B.
        sharing: one pair for all layers ("shared"), one for each layer shape ("per_shape"), or one
            for each layer ("unique").
        seed: of the basis, 0 to 2**64 - 1.
        fused: a fused projection such as GPT-2's c_attn is adapted in its "parts" (q, k, v, each
            with its own d and b) or as one "whole" matrix, as PEFT does.
        conv_layout: the matrix that a convolution is: "matrix" is (out, in / groups * kernel),
            "loralib" is (out / groups * k, in * k) with rank * k rows in A, as loralib's LoRA has
            it, for square kernels of side k.
        head: modules trained in full and stored with the adapter, such as "classifier".
        dtype: of the trained vectors.
        plan: the order in which the products are taken (the table in `veratune.ops.plans`). "auto"
            takes the cheapest for each call; the numbers are the same. It is not stored in an
            adapter's file.

    Raises:
        ConfigError: naming the setting, what was found and what is allowed.

    >>> VeraConfig(rank=0)
    Traceback (most recent call last):
        ...
    veratune.errors.ConfigError: rank is 0; it must be an integer of at least 1
    """

    rank: int = 256
    targets: tuple[str, ...] | None = None
    exclude: tuple[str, ...] = ()
    layers: tuple[int, ...] | None = None
    rank_pattern: Mapping[str, int] = dataclasses.field(default_factory=dict)
    vectors: Vectors = "both"
    d_init: float | None = None
    dropout: float = 0.0
    basis: BasisKind = "random"
    init: Init = "kaiming_uniform"
    sharing: Sharing = "shared"
    seed: int = 0
    fused: Fused = "parts"
    conv_layout: ConvLayout = "matrix"
    head: tuple[str, ...] = ()
    dtype: Dtype = "float32"
    plan: Plan = dataclasses.field(default="auto", metadata={"stored": False})

    def __post_init__(self) -> None:
        for field in ("targets", "exclude", "head"):
            object.__setattr__(self, field, _words(field, getattr(self, field)))
        if self.layers is not None:
            found: Any = (self.layers,) if _is_int(self.layers) else self.layers
            if not isinstance(found, list | tuple) or not all(_is_int(i) and i >= 0 for i in found):
                raise ConfigError(
                    f"layers is {self.layers!r}; it must be a list of block indices from 0 up"
                )
            object.__setattr__(self, "layers", tuple(found))
        _check_rank("rank", self.rank)
        if not isinstance(self.rank_pattern, Mapping):
            raise ConfigError(
                f"rank_pattern is {self.rank_pattern!r}; it must map patterns to ranks"
            )
        for pattern, rank in self.rank_pattern.items():
            _check_rank(f"rank_pattern[{pattern!r}]", rank)
        object.__setattr__(self, "rank_pattern", dict(self.rank_pattern))
        for field, choices in _CHOICES.items():
            value = getattr(self, field)
            if value not in choices:
                raise ConfigError(
                    f"{field} is {value!r}; it must be one of "
                    f"{', '.join(choices)}{near(str(value), choices)}"
                )
        if self.d_init is not None and not (_is_number(self.d_init) and math.isfinite(self.d_init)):
            raise ConfigError(f"d_init is {self.d_init!r}; it must be a finite number")
        if self.vectors == "b" and self.d_init is not None:
            raise ConfigError(
                "d_init is set, but vectors='b' has no d (it stays 1); leave d_init out"
            )
        if self.start_d == 0 and self.start_b == 0 and self.vectors == "both":
            raise ConfigError(
                "d_init is 0, and b starts at 0 too: neither would get a gradient; "
                "use another d_init, or vectors='d'"
            )
        if not _is_number(self.dropout) or not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout is {self.dropout!r}; it must be a probability in [0, 1)")
        if not _is_int(self.seed) or not 0 <= self.seed < 2**64:
            raise ConfigError(f"seed is {self.seed!r}; it must be an integer from 0 to 2**64 - 1")
        if self.dropout and self.plan in ("projected", "merged"):
            raise ConfigError(
                f"plan={self.plan!r} computes (W + ΔW) x, but with dropout={self.dropout} ΔW reads "
                "another x than W; "
                "use plan='factored' or 'dense', or leave it at 'auto'"
            )
        if self.basis == "peft":
            self._check_peft()
        if self.basis in ("lora", "principal"):
            source = "a LoRA" if self.basis == "lora" else "the base model's weights"
            for field, only in (
                ("init", "kaiming_uniform"),
                ("sharing", "shared"),
                ("conv_layout", "matrix"),
            ):
                if getattr(self, field) != only:
                    raise ConfigError(
                        f"basis={self.basis!r} takes its matrices from {source}, so "
                        f"{field}={getattr(self, field)!r} has no meaning; leave it out"
                    )

    def _check_peft(self) -> None:
        for field, only in (
            ("init", "kaiming_uniform"),
            ("sharing", "shared"),
            ("rank_pattern", {}),
        ):
            if getattr(self, field) != only:
                raise ConfigError(
                    f"basis='peft' draws one kaiming_uniform pair for one rank, but {field} is "
                    f"{getattr(self, field)!r}; leave {field} at its default or use basis='random'"
                )
        if self.seed >= 2**63:
            raise ConfigError(f"seed is {self.seed}; basis='peft' takes seeds below 2**63")

    @property
    def start_d(self) -> float:
        """The value that d starts from."""
        if self.d_init is not None:
            return self.d_init
        if self.basis == "lora":
            return 1.0
        return 0.0 if self.vectors == "d" else 0.1

    @property
    def start_b(self) -> float:
        """The value that b starts from."""
        return 1.0 if self.basis == "lora" else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return the configuration as JSON types, defaults included.

        How it is computed (`plan`) is no part of it.
        """
        stored = [
            field.name for field in dataclasses.fields(self) if field.metadata.get("stored", True)
        ]
        values = {name: getattr(self, name) for name in stored}
        return {
            k: list(v) if isinstance(v, tuple) else dict(v) if isinstance(v, Mapping) else v
            for k, v in values.items()
        }

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> "VeraConfig":
        """The inverse of `to_dict`; an unknown key is an error that names the nearest known one."""
        known = [
            field.name for field in dataclasses.fields(cls) if field.metadata.get("stored", True)
        ]
        for key in settings:
            if key not in known:
                raise ConfigError(
                    f"unknown setting {key!r} in an adapter's configuration{near(str(key), known)}"
                )
        return cls(**settings)


_CHOICES: dict[str, tuple[str, ...]] = {
    "vectors": get_args(Vectors),
    "basis": get_args(BasisKind),
    "init": get_args(Init),
    "sharing": get_args(Sharing),
    "fused": get_args(Fused),
    "conv_layout": get_args(ConvLayout),
    "dtype": get_args(Dtype),
    "plan": get_args(Plan),
}


def _words(field: str, value: Any) -> tuple[str, ...] | None:
    if value is None and field == "targets":
        return None
    words = (value,) if isinstance(value, str) else value
    if not isinstance(words, list | tuple) or not all(isinstance(w, str) and w for w in words):
        raise ConfigError(f"{field} is {value!r}; it must be a list of layer names")
    if field == "targets" and not words:
        raise ConfigError(
            "targets is empty; name at least one layer, or leave it out for query and value"
        )
    return tuple(words)


def _check_rank(name: str, rank: Any) -> None:
    if not _is_int(rank) or rank < 1:
        raise ConfigError(f"{name} is {rank!r}; it must be an integer of at least 1")


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
