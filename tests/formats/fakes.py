"""A small adapter with known values, made without any model; and edits of its file."""

import json
from collections.abc import Callable
from pathlib import Path

import safetensors.torch
import torch

from veratune.adapter import Adapter
from veratune.config import VeraConfig
from veratune.formats.container import pack

GOLDEN = Path(__file__).parent / "golden"


def small(**settings) -> Adapter:
    config = VeraConfig(rank=2, targets=["q"], **settings)
    return Adapter(
        config, {"x.q": (3, 4), "y.q": (3, 4)},
        {"x.q": torch.tensor([0.5, -1.0]), "y.q": torch.tensor([0.25, 2.0])},
        {"x.q": torch.tensor([1.0, 2.0, 3.0]), "y.q": torch.tensor([0.0, -0.5, 8.0])},
        base_id="a base", weight_fingerprint=torch.arange(64).bfloat16(), task={"name": "instruction"},
    )  # fmt: skip


def same(one: Adapter, two: Adapter) -> bool:
    def equal(a, b):
        return set(a) == set(b) and all(
            torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a
        )

    return (
        (one.config, dict(one.shapes), one.base_id, dict(one.task)) == (two.config, dict(two.shapes), two.base_id, dict(two.task))
        and equal(one.d, two.d) and equal(one.b, two.b) and equal(one.head, two.head)
        and (one.weight_fingerprint is two.weight_fingerprint or torch.equal(one.weight_fingerprint, two.weight_fingerprint))
    )  # fmt: skip


def rebuilt(data: bytes, change: Callable) -> bytes:
    """A changed file with a right digest: what an attacker who knows the format writes."""
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    about, tensors = json.loads(header["__metadata__"]["veratune"]), safetensors.torch.load(data)
    change(about, tensors)
    about.pop("digest", None)
    return pack(about, tensors)


def put(key, value):
    def change(about, tensors):
        about[key] = value

    return change


def config(**entries):
    def change(about, tensors):
        about["config"] |= entries

    return change


def tensor(name, value):
    def change(about, tensors):
        tensors.pop(name, None)
        if value is not None:
            tensors[name] = value

    return change
