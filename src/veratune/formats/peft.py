"""PEFT VeRA checkpoints, read and written.

PEFT's VeRA adapts whole linear layers, at one rank, with one pair (A, B) for all layers. An adapter
beyond that is refused with the reason. Source: peft 0.21.2, tuners/vera.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from veratune.adapter import Adapter, base_id
from veratune.config import VeraConfig
from veratune.errors import AdapterFileError, BaseModelError, UnsupportedError, VeratuneError, near
from veratune.formats.expert_lora import is_expert
from veratune.formats.lora_matrices import stored_transposed, vectors_of_layer
from veratune.formats.peft_files import (
    CONFIG_NAME,
    KEY_PREFIX,
    WEIGHTS_NAME,
    read_settings,
    read_tensors,
    write_checkpoint,
)
from veratune.layers.kinds import is_attention, linear_shape
from veratune.ops.matrix import dense
from veratune.patterns import PART
from veratune.targets import layers_of

_CPU = torch.device("cpu")


def read(folder: str | Path, model: nn.Module) -> Adapter:
    """Read a PEFT VeRA checkpoint as an Adapter with basis="peft".

    Args:
        folder: The checkpoint.
        model: The base model; the meta device will do. It gives the sizes of the layers, which a
            checkpoint does not record.

    Returns:
        The adapter.

    Raises:
        AdapterFileError: The checkpoint is damaged, not VeRA, a pickle, or its A and B are not
            those that its seed draws.
        UnsupportedError: It has settings that veratune does not have.
        BaseModelError: The model lacks a layer.
    """
    folder = Path(folder)
    try:
        return _read(folder, model)
    except (AdapterFileError, UnsupportedError) as error:
        raise type(error)(f"{folder}: {error}") from None


def write_vera(adapter: Adapter, folder: str | Path, model: nn.Module | None = None) -> None:
    """Write an Adapter as a PEFT VeRA checkpoint that computes the same ΔW (to fp32 rounding).

    A and B are written too (megabytes), so that any basis that all layers share can be expressed.
    Each layer's scale goes into its d.

    Args:
        adapter: The adapter.
        folder: The checkpoint's folder; absent or empty.
        model: The base model, if at hand: it tells PEFT how weights are stored (GPT-2's Conv1D).

    Raises:
        UnsupportedError: PEFT's VeRA cannot express the adapter.
        OutputError: The folder is in use or cannot be written.
    """
    rank = _common_rank(adapter)
    max_out, max_in = (max(sizes) for sizes in zip(*adapter.shapes.values(), strict=True))
    A, B = (
        dense(matrix)
        for matrix in adapter.basis.pair("", max_out, max_in, rank, _CPU, torch.float32)
    )
    tensors = {"base_model.vera_A": A, "base_model.vera_B": B}
    for layer, (_, n) in adapter.shapes.items():
        d, b = vectors_of_layer(adapter, layer)
        tensors[f"{KEY_PREFIX}{layer}.vera_lambda_d"] = d * adapter.basis.scale(rank, n)
        tensors[f"{KEY_PREFIX}{layer}.vera_lambda_b"] = b
    tensors |= {f"{KEY_PREFIX}{name}": tensor for name, tensor in adapter.head.items()}
    config = adapter.config
    settings = {
        "peft_type": "VERA",
        "r": rank,
        "projection_prng_key": config.seed if config.basis == "peft" else 0,
        "save_projection": True,
        "vera_dropout": config.dropout,
        "d_initial": config.start_d,
        "bias": "none",
        "init_weights": True,
        "base_model_name_or_path": adapter.base_id or None,
        "target_modules": list(adapter.shapes),
        "modules_to_save": list(config.head) or None,
        "fan_in_fan_out": stored_transposed(model),
        "inference_mode": True,
        "task_type": None,
    }
    write_checkpoint(folder, settings, tensors)


def _common_rank(adapter: Adapter) -> int:
    """The adapter's one rank. Raises UnsupportedError where PEFT's VeRA cannot express it."""
    for layer in adapter.shapes:
        if is_expert(layer):
            raise UnsupportedError(
                f"PEFT's VeRA adapts linear layers, and '{layer}' is one expert of a fused weight; "
                "export with --to peft-lora"
            )
        if PART in layer:
            raise UnsupportedError(
                f"PEFT's VeRA adapts whole layers, and '{layer}' is part of one; "
                "export with --to peft-lora, or train with fused='whole'"
            )
        if layer in adapter.kernels:
            raise UnsupportedError(
                f"PEFT's VeRA adapts linear layers, and '{layer}' is a convolution; "
                "export with --to peft-lora"
            )
    config = adapter.config
    if config.basis == "monarch":
        raise UnsupportedError(
            "PEFT's VeRA has full matrices A and B; this adapter has basis='monarch', whose blocks "
            "differ with a layer's size. Export with --to peft-lora"
        )
    if config.basis in ("principal", "lora"):
        raise UnsupportedError(
            "PEFT's VeRA has one pair (A, B) for all layers; this adapter has "
            f"basis={config.basis!r}, a pair for each layer. Export with --to peft-lora"
        )
    if config.sharing != "shared":
        raise UnsupportedError(
            "PEFT's VeRA has one pair (A, B) for all layers; this adapter has "
            f"sharing={config.sharing!r}. Export with --to peft-lora"
        )
    ranks = sorted(set(adapter.ranks.values()))
    if len(ranks) > 1:
        raise UnsupportedError(
            "PEFT's VeRA has one rank; this adapter has the ranks "
            f"{', '.join(map(str, ranks))}. Export with --to peft-lora"
        )
    return ranks[0]


def _read(folder: Path, model: nn.Module) -> Adapter:
    settings, tensors = read_settings(folder), read_tensors(folder)
    kind = settings.get("peft_type")
    if kind != "VERA":
        raise AdapterFileError(f"it is a PEFT {kind} checkpoint; only VERA can be read")
    if settings.get("bias", "none") != "none":
        raise UnsupportedError(
            f"it was trained with bias={settings['bias']!r}; only vectors and heads can be read"
        )
    A, B = tensors.pop("base_model.vera_A", None), tensors.pop("base_model.vera_B", None)
    d, b, head = _split(tensors)
    config = _config(settings, d, head)
    base = settings.get("base_model_name_or_path") or base_id(model)
    adapter = Adapter(config, _shapes(d, model), d, b, head, base)
    _check_basis(adapter, A, B)
    return adapter


def _split(
    tensors: dict[str, Tensor],
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """(d, b, head) of a checkpoint's tensors, by name."""
    d, b, head = {}, {}, {}
    for key in sorted(tensors):  # safetensors returns them in another order each time
        name = key.removeprefix(KEY_PREFIX)
        if name.endswith(".vera_lambda_d"):
            d[name.removesuffix(".vera_lambda_d")] = tensors[key]
        elif name.endswith(".vera_lambda_b"):
            b[name.removesuffix(".vera_lambda_b")] = tensors[key]
        else:
            head[name] = tensors[key]
    if not d:
        raise AdapterFileError(f"{WEIGHTS_NAME} holds no vera_lambda_d")
    return d, b, head


def _config(settings: dict[str, Any], d: dict[str, Tensor], head: dict[str, Tensor]) -> VeraConfig:
    """The VeraConfig of PEFT's settings."""
    heads = tuple(
        module
        for module in settings.get("modules_to_save") or ()
        if any(f".{module}." in f".{name}" for name in head)
    )
    try:
        return VeraConfig(
            rank=settings["r"],
            targets=_targets(settings, d),
            layers=settings.get("layers_to_transform"),
            d_init=settings.get("d_initial", 0.1),
            dropout=settings.get("vera_dropout", 0.0),
            basis="peft",
            seed=settings.get("projection_prng_key", 0),
            fused="whole",
            head=heads,
            dtype=str(next(iter(d.values())).dtype).removeprefix("torch."),  # type: ignore[arg-type]
        )
    except KeyError as error:
        raise AdapterFileError(f"{CONFIG_NAME} has no entry {error}") from None
    except VeratuneError as error:
        raise AdapterFileError(f"{CONFIG_NAME}: {error}") from None


def _targets(settings: dict[str, Any], d: dict[str, Tensor]) -> tuple[str, ...]:
    """The targets: PEFT's list of name endings as it is, or every layer in full.

    PEFT's regular expressions have no counterpart here.
    """
    targets = settings.get("target_modules")
    if (
        isinstance(targets, list)
        and not settings.get("exclude_modules")
        and not settings.get("layers_pattern")
    ):
        return tuple(sorted(targets))
    return tuple(d)


def _shapes(d: dict[str, Tensor], model: nn.Module) -> dict[str, tuple[int, int]]:
    layers = dict(layers_of(model))
    for layer in d:
        if layer not in layers or is_attention(layers[layer]):
            raise BaseModelError(
                f"it adapts '{layer}', which {type(model).__name__} does not "
                f"have{near(layer, layers)}"
            )
    return {layer: linear_shape(layers[layer]) for layer in d}


def _check_basis(adapter: Adapter, A: Tensor | None, B: Tensor | None) -> None:
    """Raise AdapterFileError if the checkpoint's A and B are not those that its seed draws."""
    if A is None or B is None:
        return
    max_out, max_in = (max(sizes) for sizes in zip(*adapter.shapes.values(), strict=True))
    rank = adapter.config.rank
    if A.shape != (rank, max_in) or B.shape != (max_out, rank):
        raise AdapterFileError(
            f"its vera_A {tuple(A.shape)} and vera_B {tuple(B.shape)} do not fit the layers, which "
            f"want {(rank, max_in)} and {(max_out, rank)}. PEFT lets a second adapter share the "
            "first "
            "one's matrices; train it alone to move it"
        )
    drawn = [
        dense(matrix)
        for matrix in adapter.basis.pair("", max_out, max_in, rank, _CPU, torch.float32)
    ]
    if not (torch.equal(A, drawn[0].to(A.dtype)) and torch.equal(B, drawn[1].to(B.dtype))):
        raise AdapterFileError(
            f"its vera_A and vera_B are not what seed {adapter.config.seed} draws, so they came "
            "from "
            "elsewhere (another adapter in the same PEFT model, another torch, or an export): a "
            "seed "
            "cannot reproduce them"
        )
