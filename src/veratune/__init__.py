"""veratune: fine-tune any PyTorch model in kilobytes, and keep a million of the results."""

from veratune.adapter import Adapter, extract, install
from veratune.attach import attach, detach, remove
from veratune.config import VeraConfig
from veratune.errors import VeratuneError
from veratune.files import load, save
from veratune.formats.lora import read_lora
from veratune.layers.weight_cache import cache_weights
from veratune.merging import merge, unmerge
from veratune.model_state import active, adapters, count_trained
from veratune.pretrained import from_pretrained
from veratune.selection import disabled, reference, rows, use

__version__ = "0.1.0"

__all__ = [
    "Adapter",
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
    "read_lora",
    "reference",
    "remove",
    "rows",
    "save",
    "unmerge",
    "use",
]
