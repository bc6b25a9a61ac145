"""Count parameters, bytes and memory of a method from a model's configuration, without weights."""

import dataclasses
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import transformers
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)

from veratune.adapter import Adapter
from veratune.basis.basis import Basis, new_basis
from veratune.basis.directions import LayerDirections
from veratune.basis.principal import PrincipalBasis, blank_fingerprint
from veratune.config import VeraConfig
from veratune.errors import ConfigError, DataError
from veratune.fingerprint import FINGERPRINT_VALUES, fingerprint_shape
from veratune.formats import native
from veratune.targets import Site, find_sites

Method = Literal["vera", "lora", "bitfit", "head", "full"]
_META = torch.device("meta")


@dataclasses.dataclass(frozen=True)
class Count:
    """The cost of fine-tuning one model with one method. Sizes are in bytes.

    Attributes:
        model: The model, as given.
        method: The method.
        rank: Of VeRA or LoRA; None for other methods.
        trainable: Trained values without the task head (method "head": the head).
        head: Values of the task head.
        layers: Adapted matrices.
        bytes_fp32, bytes_bf16: Of the trainable values.
        file_bytes: Of the adapter file; None for methods without one.
        basis_bytes: Of A and B in memory, in fp32.
        base_parameters, base_bytes: Of the frozen model, in the dtype that was asked for.
        state_bytes: Weights, gradients and both Adam moments of the trained values, in fp32.
        activation_bytes: Estimated for the batch and length that were asked for.
        train_bytes: The sum of all memory.
        flops_per_token: Of one training step, estimated: two for each multiply-add.
    """

    model: str
    method: str
    rank: int | None
    trainable: int
    head: int
    layers: int
    bytes_fp32: int
    bytes_bf16: int
    file_bytes: int | None
    basis_bytes: int
    base_parameters: int
    base_bytes: int
    state_bytes: int
    activation_bytes: int
    train_bytes: int
    flops_per_token: int


def count(
    model: str,
    method: Method = "vera",
    vera: VeraConfig | None = None,
    *,
    batch: int = 1,
    length: int = 512,
    dtype: str = "bfloat16",
) -> Count:
    """Count a method's parameters, bytes and memory for a model.

    Args:
        model: A config.json, a folder that holds one, or a Hugging Face id.
        method: The method.
        vera: Rank and targets, for vera and lora.
        batch, length: Sequences and tokens of a training step.
        dtype: Of the frozen weights, by its name in torch.

    Raises:
        DataError: There is no configuration.
        TargetError: The targets do not fit the model.
    """
    vera = vera or VeraConfig()
    empty = empty_model(model)
    heads = _heads(empty)
    head = sum(p.numel() for module in heads for p in module.parameters())
    base = sum(p.numel() for p in empty.parameters())
    figures = _method_figures(empty, model, method, vera, heads)
    trained = figures.trainable if method == "head" else figures.trainable + head
    size = getattr(torch, dtype).itemsize
    activation_bytes = _activations(empty.config, batch, length, size)
    # A frozen weight has no gradient: half of the backward pass.
    backward = 4 if method == "full" else 2
    per_value = 4 if method == "vera" else 6
    return Count(
        model=model,
        method=method,
        rank=vera.rank if method in ("vera", "lora") else None,
        trainable=figures.trainable,
        head=head,
        layers=figures.layers,
        bytes_fp32=figures.trainable * 4,
        bytes_bf16=figures.trainable * 2,
        file_bytes=figures.file_bytes,
        basis_bytes=figures.basis_bytes,
        base_parameters=base,
        base_bytes=base * size,
        state_bytes=trained * 16,
        activation_bytes=activation_bytes,
        train_bytes=base * size + figures.basis_bytes + trained * 16 + activation_bytes,
        flops_per_token=(2 + backward) * base + per_value * figures.frozen_values,
    )


class _Figures(NamedTuple):
    """A method's own figures; frozen_values: of A and B, summed over the layers."""

    trainable: int
    layers: int = 0
    frozen_values: int = 0
    file_bytes: int | None = None
    basis_bytes: int = 0


def _method_figures(
    empty: PreTrainedModel, model: str, method: str, vera: VeraConfig, heads: list[nn.Module]
) -> _Figures:
    inside = {id(p) for module in heads for p in module.parameters()}
    if method in ("vera", "lora"):
        sites = find_sites(empty, vera)
        frozen = sum(site.rank * sum(site.shape) for site in sites)
        if method == "lora":
            return _Figures(frozen, len(sites), frozen)
        return _vera_figures(empty, model, vera, sites, frozen)
    if method == "bitfit":
        biases = (
            p.numel()
            for name, p in empty.named_parameters()
            if name.endswith("bias") and id(p) not in inside
        )
        return _Figures(sum(biases))
    if method == "head":
        return _Figures(sum(p.numel() for module in heads for p in module.parameters()))
    if method == "full":
        return _Figures(sum(p.numel() for p in empty.parameters() if id(p) not in inside))
    raise ConfigError(f"unknown method {method!r}; there are vera, lora, bitfit, head, full")


def _vera_figures(
    empty: PreTrainedModel, model: str, vera: VeraConfig, sites: list[Site], frozen: int
) -> _Figures:
    adapter = _blank(vera, sites, model, fingerprint_shape(empty, []))
    basis: Basis
    if vera.basis == "principal":
        ranks = {site.name: site.rank for site in sites}
        layers = {k: LayerDirections(k, None, rank, vera.seed) for k, rank in ranks.items()}
        basis = PrincipalBasis(vera.seed, layers)
        blank = blank_fingerprint(len(ranks))
        adapter = dataclasses.replace(adapter, lora_fingerprint=blank)
    else:
        basis = new_basis(vera, dict(adapter.shapes))
    basis.reserve([(s.name, *s.shape, s.rank) for s in sites], _META, torch.float32)
    return _Figures(
        adapter.trained_values,
        len(sites),
        frozen,
        len(native.encode(adapter)),
        basis.allocated_bytes(),
    )


def empty_model(model: str) -> PreTrainedModel:
    """A model on the meta device, with the architecture that its configuration names, or its
    backbone; a GGUF file is a causal language model.
    """
    path = Path(model)
    if path.suffix == ".json" and not path.is_file():
        raise DataError(f"{model}: no such file")
    try:
        if path.suffix == ".gguf":
            config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
        else:
            config = AutoConfig.from_pretrained(model)
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(
            f"no model configuration at {model!r}: {reason}. Give a config.json or a folder that "
            "holds one"
        ) from error
    named = getattr(transformers, (config.architectures or [""])[0], None)
    kind = AutoModelForCausalLM if path.suffix == ".gguf" else AutoModel
    with _META:
        return named(config) if named is not None else kind.from_config(config)


def _heads(model: PreTrainedModel) -> list[nn.Module]:
    """The task head of a classifier: what stands beside the backbone and is not the language
    model's output.
    """
    prefix = getattr(model, "base_model_prefix", "")
    if not prefix or not hasattr(model, prefix) or model.get_output_embeddings() is not None:
        return []
    return [child for name, child in model.named_children() if name != prefix]


def _blank(vera: VeraConfig, sites: list[Site], model: str, sample: tuple[int, int]) -> Adapter:
    return Adapter(
        config=dataclasses.replace(vera, head=()),
        shapes={s.name: s.shape for s in sites},
        d={s.name: torch.zeros(s.rank) for s in sites} if vera.vectors != "b" else {},
        b={s.name: torch.zeros(s.shape[0]) for s in sites} if vera.vectors != "d" else {},
        base_id=model,
        weight_fingerprint=torch.zeros(FINGERPRINT_VALUES, dtype=torch.bfloat16),
        kernels={s.name: s.part.kernel for s in sites if s.part.kernel},
        base_fingerprint=torch.zeros(sample, dtype=torch.int8),
    )


def _activations(config: PreTrainedConfig, batch: int, length: int, itemsize: int) -> int:
    """Bytes kept for the backward pass: per layer 17 values a token and hidden unit, attention not
    kept whole.

    Source: Korthikanti et al., "Reducing activation recomputation in large transformer models",
    2022, section 4.1, without the attention matrix, which fused attention does not store. An
    estimate: it leaves out the logits, and knows nothing of other architectures.
    """
    text: Any = config.get_text_config()
    hidden = getattr(text, "hidden_size", 0) or 0
    layers = getattr(text, "num_hidden_layers", 0) or 0
    return batch * length * hidden * layers * 17 * itemsize
