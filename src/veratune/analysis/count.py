"""Count parameters, bytes and memory of a method from a model's configuration, without weights."""

import dataclasses
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel

from veratune.adapter import Adapter
from veratune.basis.basis import Basis, new_basis
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

    trainable: the method's own values, the task head apart (for method "head": the head); head:
    values of the task head; layers: adapted matrices; bytes_fp32, bytes_bf16: of the trainable
    values; file_bytes: of the adapter's file (vera; None otherwise); basis_bytes: of A and B in
    memory, fp32; base_parameters, base_bytes: of the frozen model in `dtype`; state_bytes: weights,
    gradients and both Adam moments of the trained values, fp32; activation_bytes: estimated, at
    `batch` x `length` tokens; train_bytes: their sum; flops_per_token: multiply-adds times two of
    one training step, estimated.
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
    """Count for a model given by its config.json, a folder that holds one, or a Hugging Face id.

    vera: rank and targets, for vera and lora. batch, length: sequences and tokens of a training
    step. Raises DataError if there is no configuration, TargetError if the targets do not fit.
    """
    vera = vera or VeraConfig()
    empty = empty_model(model)
    heads = _heads(empty)
    head = sum(p.numel() for module in heads for p in module.parameters())
    base = sum(p.numel() for p in empty.parameters())
    layers, extra, file_bytes, basis_bytes = 0, 0, None, 0
    if method in ("vera", "lora"):
        sites = find_sites(empty, vera)
        layers = len(sites)
        extra = sum(site.rank * sum(site.shape) for site in sites)
        if method == "lora":
            trainable = extra
        else:
            adapter = _blank(vera, sites, model, fingerprint_shape(empty, []))
            basis: Basis
            if vera.basis == "principal":
                ranks = {site.name: site.rank for site in sites}
                basis = PrincipalBasis(vera.seed, ranks, {})
                blank = blank_fingerprint(len(ranks))
                adapter = dataclasses.replace(adapter, lora_fingerprint=blank)
            else:
                basis = new_basis(vera, dict(adapter.shapes))
            trainable = adapter.trained_values
            file_bytes = len(native.encode(adapter))
            basis.reserve([(s.name, *s.shape, s.rank) for s in sites], _META, torch.float32)
            basis_bytes = basis.allocated_bytes()
    elif method == "bitfit":
        inside = {id(p) for module in heads for p in module.parameters()}
        trainable = sum(
            p.numel()
            for n, p in empty.named_parameters()
            if n.endswith("bias") and id(p) not in inside
        )
    elif method == "head":
        trainable = head
    elif method == "full":
        trainable = base - head
    else:
        raise ConfigError(f"unknown method {method!r}; there are vera, lora, bitfit, head, full")
    trained = trainable if method == "head" else trainable + head
    base_bytes = base * getattr(torch, dtype).itemsize
    state_bytes = trained * 16
    activation_bytes = _activations(empty.config, batch, length, getattr(torch, dtype).itemsize)
    backward = (
        4 if method == "full" else 2
    )  # a frozen weight has no gradient: half of the backward pass
    return Count(
        model=model,
        method=method,
        rank=vera.rank if method in ("vera", "lora") else None,
        trainable=trainable,
        head=head,
        layers=layers,
        bytes_fp32=trainable * 4,
        bytes_bf16=trainable * 2,
        file_bytes=file_bytes,
        basis_bytes=basis_bytes,
        base_parameters=base,
        base_bytes=base_bytes,
        state_bytes=state_bytes,
        activation_bytes=activation_bytes,
        train_bytes=base_bytes + basis_bytes + state_bytes + activation_bytes,
        flops_per_token=(2 + backward) * base + (4 if method == "vera" else 6) * extra,
    )


def empty_model(model: str) -> PreTrainedModel:
    """A model on the meta device, with the architecture that its configuration names, or its
    backbone.
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
    with _META:
        return named(config) if named is not None else AutoModel.from_config(config)


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
