"""veratune: fine-tune any PyTorch model in kilobytes, and keep a million of the results."""

from typing import TYPE_CHECKING, Any

from veratune.adapter import Adapter, extract, install
from veratune.attach import attach, detach, remove
from veratune.config import VeraConfig
from veratune.errors import VeratuneError
from veratune.files import load, save
from veratune.formats.lora import read_lora
from veratune.layers.weight_cache import cache_weights
from veratune.merging import merge, unmerge
from veratune.mixing import MixPart, mix
from veratune.model_state import active, adapters, count_trained
from veratune.pretrained import from_pretrained
from veratune.selection import disabled, reference, rows, use

if TYPE_CHECKING:
    from veratune.fleet.fleet import Fleet

__version__ = "0.1.0"

__all__ = [
    "Adapter",
    "Fleet",
    "MixPart",
    "VeraConfig",
    "VeratuneError",
    "active",
    "adapters",
    "attach",
    "cache_weights",
    "count_trained",
    "detach",
    "disabled",
    "extract",
    "from_pretrained",
    "install",
    "load",
    "merge",
    "mix",
    "read_lora",
    "reference",
    "remove",
    "rows",
    "save",
    "unmerge",
    "use",
]


def __getattr__(name: str) -> Any:
    """Import `Fleet` when it is used: it needs transformers and datasets."""
    if name == "Fleet":
        from veratune.fleet.fleet import Fleet

        return Fleet
    raise AttributeError(f"module 'veratune' has no attribute {name!r}")
