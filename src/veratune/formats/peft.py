"""Checkpoints of Hugging Face PEFT: VeRA both ways, and LoRA out.

A PEFT folder holds `adapter_config.json` and `adapter_model.safetensors`. PEFT's VeRA knows linear layers
adapted whole, at one rank, on one pair (A, B) for all; what it cannot express is refused with the reason.
Source: peft 0.21.2, tuners/vera and utils/save_and_load.py.
"""

import json
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from veratune.adapter import Adapter, base_id
from veratune.config import VeraConfig
from veratune.errors import AdapterFileError, BaseModelError, UnsupportedError, VeratuneError, near
from veratune.formats.atomic import new_folder
from veratune.ops.matrix import dense
from veratune.targets import PART, layers_of, linear_shape

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_CPU = torch.device("cpu")


def read(folder: str | Path, model: nn.Module) -> Adapter:
    """A PEFT VeRA checkpoint as an Adapter with basis="peft".

    model: the base model (the meta device will do): a checkpoint does not say how wide its layers are.
    Raises AdapterFileError for a checkpoint that is damaged, is not VeRA, holds pickles, or whose matrices
    are not those that its seed draws; UnsupportedError for settings that have no counterpart here.
    """
    folder = Path(folder)
    try:
        return _read(folder, model)
    except (AdapterFileError, UnsupportedError) as error:
        raise type(error)(f"{folder}: {error}") from None


def write_vera(adapter: Adapter, folder: str | Path) -> None:
    """Write an Adapter as a PEFT VeRA checkpoint that computes the same ΔW (to fp32 rounding).

    The matrices are written too (megabytes), so any basis that all layers share will do: the layers' scales
    go into d. Raises UnsupportedError where PEFT cannot express the adapter; OutputError.
    """
    config = adapter.config
    _refuse_parts(adapter, "PEFT's VeRA")
    if config.basis == "monarch":
        raise UnsupportedError(
            "PEFT's VeRA has full matrices A and B; this adapter has basis='monarch', whose blocks differ with a layer's size. "
            "Export it as a LoRA instead"
        )
    if config.sharing != "shared":
        raise UnsupportedError(
            f"PEFT's VeRA has one pair (A, B) for all layers; this adapter has sharing={config.sharing!r}"
        )
    ranks = sorted(set(adapter.ranks.values()))
    if len(ranks) > 1:
        raise UnsupportedError(
            f"PEFT's VeRA has one rank; this adapter has the ranks {', '.join(map(str, ranks))}"
        )
    rank = ranks[0]
    max_out, max_in = (max(sizes) for sizes in zip(*adapter.shapes.values(), strict=True))
    A, B = (
        dense(matrix)
        for matrix in adapter.basis.pair("", max_out, max_in, rank, _CPU, torch.float32)
    )
    tensors = {"base_model.vera_A": A, "base_model.vera_B": B}
    for layer, (m, n) in adapter.shapes.items():
        d = adapter.d[layer].float() if layer in adapter.d else torch.ones(rank)
        tensors[f"{_PREFIX}{layer}.vera_lambda_d"] = d * adapter.basis.scale(rank, n)
        tensors[f"{_PREFIX}{layer}.vera_lambda_b"] = (
            adapter.b[layer].float() if layer in adapter.b else torch.ones(m)
        )
    settings = {
        "peft_type": "VERA",
        "r": rank,
        "projection_prng_key": config.seed if config.basis == "peft" else 0,
        "save_projection": True,
        "vera_dropout": config.dropout,
        "d_initial": config.start_d,
        "bias": "none",
        "init_weights": True,
    }
    _write(adapter, folder, settings, tensors)


def write_lora(adapter: Adapter, folder: str | Path) -> None:
    """Write an Adapter as a PEFT LoRA of the same rank: lora_A = diag(d) A, lora_B = diag(b) B.

    Every tool that takes LoRA takes it; megabytes where VeRA needs kilobytes.
    Raises UnsupportedError for parts of fused layers; OutputError.
    """
    config = adapter.config
    _refuse_parts(adapter, "PEFT's LoRA of one layer")
    tensors = {}
    for layer, (m, n) in adapter.shapes.items():
        rank = adapter.ranks[layer]
        A, B = (
            dense(matrix) for matrix in adapter.basis.pair(layer, m, n, rank, _CPU, torch.float32)
        )
        d = adapter.d[layer].float() if layer in adapter.d else torch.ones(rank)
        b = adapter.b[layer].float() if layer in adapter.b else torch.ones(m)
        tensors[f"{_PREFIX}{layer}.lora_A.weight"] = (d * adapter.basis.scale(rank, n))[:, None] * A
        tensors[f"{_PREFIX}{layer}.lora_B.weight"] = b[:, None] * B
    ranks = {layer: rank for layer, rank in adapter.ranks.items() if rank != config.rank}
    settings = {
        "peft_type": "LORA",
        "r": config.rank,
        "lora_alpha": config.rank,
        "rank_pattern": ranks,
        "alpha_pattern": ranks,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
    }
    _write(adapter, folder, settings, tensors)


def _write(
    adapter: Adapter, folder: str | Path, settings: dict[str, Any], tensors: dict[str, Tensor]
) -> None:
    for name, tensor in adapter.head.items():
        tensors[f"{_PREFIX}{name}"] = tensor
    settings |= {
        "base_model_name_or_path": adapter.base_id or None,
        "target_modules": list(adapter.shapes),
        "modules_to_save": list(adapter.config.head) or None,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "task_type": None,
    }
    data = safetensors.torch.save(
        {k: v.contiguous().clone() for k, v in tensors.items()}, {"format": "pt"}
    )
    with new_folder(Path(folder)) as path:
        (path / WEIGHTS).write_bytes(data)
        (path / CONFIG).write_text(json.dumps(settings, indent=2, sort_keys=True))


def _refuse_parts(adapter: Adapter, what: str) -> None:
    for layer in adapter.shapes:
        if PART in layer:
            raise UnsupportedError(
                f"{what} adapts whole layers, and '{layer}' is part of one; train with fused='whole' to export the adapter"
            )
        if layer in adapter.kernels:
            raise UnsupportedError(
                f"'{layer}' is a convolution, which is not exported to {what}; merge the adapter instead"
            )


def _read(folder: Path, model: nn.Module) -> Adapter:
    settings, tensors = _settings(folder), _tensors(folder)
    kind = settings.get("peft_type")
    if kind != "VERA":
        raise AdapterFileError(f"it is a PEFT {kind} checkpoint; only VERA can be read")
    if settings.get("bias", "none") != "none":
        raise UnsupportedError(
            f"it was trained with bias={settings['bias']!r}; only the vectors and heads can be taken over"
        )
    A, B = tensors.pop("base_model.vera_A", None), tensors.pop("base_model.vera_B", None)
    d, b, head = {}, {}, {}
    for key in sorted(tensors):  # safetensors hands them out in another order each time
        tensor, name = tensors[key], key.removeprefix(_PREFIX)
        if name.endswith(".vera_lambda_d"):
            d[name.removesuffix(".vera_lambda_d")] = tensor
        elif name.endswith(".vera_lambda_b"):
            b[name.removesuffix(".vera_lambda_b")] = tensor
        else:
            head[name] = tensor
    if not d:
        raise AdapterFileError(f"{WEIGHTS} holds no vera_lambda_d")
    heads = tuple(
        h
        for h in settings.get("modules_to_save") or ()
        if any(f".{h}." in f".{name}" for name in head)
    )
    try:
        config = VeraConfig(
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
        raise AdapterFileError(f"{CONFIG} has no entry {error}") from None
    except VeratuneError as error:
        raise AdapterFileError(f"{CONFIG}: {error}") from None
    adapter = Adapter(
        config,
        _shapes(d, model),
        d,
        b,
        head,
        settings.get("base_model_name_or_path") or base_id(model),
    )
    _check_basis(adapter, A, B)
    return adapter


def _settings(folder: Path) -> dict[str, Any]:
    try:
        settings = json.loads((folder / CONFIG).read_text())
    except OSError as error:
        raise AdapterFileError(f"no PEFT checkpoint: {CONFIG}: {error.strerror}") from None
    except ValueError as error:
        raise AdapterFileError(f"{CONFIG} is not JSON ({error})") from None
    if not isinstance(settings, dict):
        raise AdapterFileError(f"{CONFIG} is not a JSON object")
    return settings


def _tensors(folder: Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load((folder / WEIGHTS).read_bytes())
    except OSError as error:
        hint = "; it holds adapter_model.bin, a pickle, which is never read: save it again as safetensors"
        raise AdapterFileError(
            f"{WEIGHTS}: {error.strerror}{hint if (folder / 'adapter_model.bin').exists() else ''}"
        ) from None
    except (safetensors.SafetensorError, ValueError, KeyError) as error:
        raise AdapterFileError(f"{WEIGHTS} is not a whole safetensors file ({error})") from None


def _targets(settings: dict[str, Any], d: dict[str, Tensor]) -> tuple[str, ...]:
    """PEFT's list of name endings means the same here; its regular expressions do not: those layers are named in full."""
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
        if layer not in layers or isinstance(layers[layer], nn.MultiheadAttention):
            raise BaseModelError(
                f"it adapts '{layer}', which {type(model).__name__} does not have{near(layer, layers)}"
            )
    return {layer: linear_shape(layers[layer]) for layer in d}


def _check_basis(adapter: Adapter, A: Tensor | None, B: Tensor | None) -> None:
    """The matrices in the file, if they are there, must be those that the seed draws."""
    if A is None or B is None:
        return
    max_out, max_in = (max(sizes) for sizes in zip(*adapter.shapes.values(), strict=True))
    rank = adapter.config.rank
    if A.shape != (rank, max_in) or B.shape != (max_out, rank):
        raise AdapterFileError(
            f"its vera_A {tuple(A.shape)} and vera_B {tuple(B.shape)} do not fit the layers, which want {(rank, max_in)} and "
            f"{(max_out, rank)}. PEFT lets a second adapter share the first one's matrices; train it alone to move it"
        )
    drawn = [
        dense(matrix)
        for matrix in adapter.basis.pair("", max_out, max_in, rank, _CPU, torch.float32)
    ]
    if not (torch.equal(A, drawn[0].to(A.dtype)) and torch.equal(B, drawn[1].to(B.dtype))):
        raise AdapterFileError(
            f"its vera_A and vera_B are not what seed {adapter.config.seed} draws, so they came from elsewhere (another "
            "adapter in the same PEFT model, another torch, or an export): they cannot be had again from a seed"
        )
