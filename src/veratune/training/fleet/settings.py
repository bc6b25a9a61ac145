"""FleetSettings: what a fleet has beyond the settings of one training run."""

import dataclasses
import math

from veratune.errors import ConfigError
from veratune.training.settings import TrainSettings

# Settings of `veratune train` that a fleet does not have.
_REFUSED = (
    "method",
    "options",
    "batch_norm",
    "group_by_length",
    "gradient_accumulation_steps",
    "ema",
    "label_smoothing",
    "report_to",
    "save_steps",
    "find_lr",
    "packing",
    "padding_free",
    "num_workers",
    "streaming",
    "attn_implementation",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FleetSettings:
    """Settings of `veratune train-fleet` beside those of `veratune train`.

    Args:
        tenant_column: The column that names each example's tenant.
        eval_fraction: Share of each tenant's examples that is held out for evaluation, when there
            is no evaluation data; 0 for none.
        max_active: Tenants whose values and optimizer state are in memory.
        tenants_per_step: Tenants that take a step together.
        max_batch_tokens: Padded tokens (images: examples) of one forward pass; 0 chooses by device:
            512 on a processor, whose caches hold them, and 16,384 on a GPU (images: 8 and 128).
        max_examples: Examples of one tenant that are used; 0 for all.
        checkpoint_seconds: Seconds between checkpoints; a killed run loses at most these.
        continue_from: A folder of adapter files, or a store of `veratune serve`; a tenant that has
            an adapter there starts from it.
        store: A store of `veratune serve` (a SQLite file, or s3://, gs://, az://, file://) in which
            every finished adapter becomes its tenant's next version; default: files in `out`.
        adapter_name: The name of every tenant's adapter in a store.
        workers: Ray actors that share the tenants, on this machine or the cluster that RAY_ADDRESS
            names; 1: this process alone, or torchrun's processes.
        strict: Whether a tenant that cannot be trained fails the whole run.
    """

    tenant_column: str = "tenant"
    eval_fraction: float = 0.0
    max_active: int = 256
    tenants_per_step: int = 64
    max_batch_tokens: int = 0
    max_examples: int = 0
    checkpoint_seconds: float = 60.0
    continue_from: str | None = None
    store: str | None = None
    adapter_name: str = "personal"
    workers: int = 1
    strict: bool = False

    def __post_init__(self) -> None:
        for field, least in (
            ("max_active", 1),
            ("tenants_per_step", 1),
            ("workers", 1),
            ("max_batch_tokens", 0),
            ("max_examples", 0),
        ):
            if getattr(self, field) < least:
                raise ConfigError(f"{field} is {getattr(self, field)}; it must be at least {least}")
        if not 0 <= self.eval_fraction < 1:
            raise ConfigError(f"eval_fraction is {self.eval_fraction}; it must be in [0, 1)")
        if not math.isfinite(self.checkpoint_seconds) or self.checkpoint_seconds < 0:
            raise ConfigError(
                f"checkpoint_seconds is {self.checkpoint_seconds}; it must be at least 0"
            )


def check_settings(settings: TrainSettings, fleet: FleetSettings) -> None:
    """Refuse settings that a fleet would ignore. Raises ConfigError naming the first."""
    defaults = {field.name: field for field in dataclasses.fields(TrainSettings)}
    for name in _REFUSED:
        field = defaults[name]
        default = (
            field.default_factory()
            if field.default_factory is not dataclasses.MISSING
            else field.default
        )
        if getattr(settings, name) != default:
            raise ConfigError(
                f"{name} is {getattr(settings, name)!r}, but a fleet has no such setting; "
                "leave it out, or train the tenants one by one with veratune train"
            )
    if settings.mixed_precision == "fp16":
        raise ConfigError("mixed_precision is 'fp16', but a fleet trains in float32 or bf16")
    if settings.patience and settings.eval_data is None and not fleet.eval_fraction:
        raise ConfigError(
            f"patience is {settings.patience}, but there is nothing to evaluate on; "
            "give --eval-data or --eval-fraction"
        )
