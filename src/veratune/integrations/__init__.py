"""Callbacks for other people's trainers: transformers, TRL and Lightning.

    from veratune.integrations import VeraCallback, VeraLightningCallback

Each is imported when it is asked for, so that the other library need not be installed.
"""

import importlib
from typing import Any

_MODULES = {"VeraCallback": "trainer", "VeraLightningCallback": "lightning"}
__all__ = ["VeraCallback", "VeraLightningCallback"]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
