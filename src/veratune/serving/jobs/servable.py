"""Whether an adapter with some settings could be served, known before it is trained."""

from collections.abc import Mapping
from typing import Any

from veratune.config import VeraConfig
from veratune.errors import ConfigError, TargetError, UnsupportedError
from veratune.serving.engine.protocol import ServingEngine
from veratune.targets import find_sites


def check_servable(
    loops: Mapping[str, ServingEngine[Any]], model: str, settings: Mapping[str, object]
) -> None:
    """Check that an adapter of a fine-tuning job could be published here.

    Args:
        loops: The engines, by served name of their base model.
        model: A base model's served name.
        settings: Flags of `veratune train`, of which "rank" and "targets" count.

    Raises:
        ConfigError: A setting is invalid.
        UnsupportedError: The adapter could not be served: its rank or a layer.
    """
    chosen: dict[str, Any] = {k: settings[k] for k in ("rank", "targets") if k in settings}
    config = VeraConfig(**chosen)
    pool = loops[model].pool
    if pool.max_rank is not None and config.rank > pool.max_rank:
        raise UnsupportedError(
            f"rank {config.rank:,} could not be served here; ranks up to {pool.max_rank:,} can"
        )
    try:
        sites = find_sites(pool.base_model, config)
    except TargetError as error:
        raise ConfigError(f"targets: {error}") from None
    for site in sites:
        if site.part.kernel or site.part.expert is not None:
            kind = "a convolution" if site.part.kernel else "an expert"
            raise UnsupportedError(
                f"targets: layer '{site.name}' is {kind}, which this server does not "
                "serve; name linear layers"
            )
