"""Whole models with random weights: one training step, forward and backward."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformers as hf
from torch import nn

from veratune.analysis.machine import describe_machine
from veratune.errors import ConfigError, near
from veratune_lab.bench.measure import Timing, flops, peak_bytes, saved_bytes, summary
from veratune_lab.bench.peers import FROZEN, OTHERS, OURS, Peer, adapted

DEFAULT_TIMING = Timing()


@dataclasses.dataclass(frozen=True)
class Shape:
    """A model of the benchmark.

    make: builds it with some blocks; layers: how many it has, quick: how many are enough for two minutes; batch: sequences and
    tokens in each; width: of an embedded token; targets: in PEFT's and veratune's words.
    """

    make: Callable[[int], nn.Module]
    layers: int
    quick: int
    batch: tuple[int, int]
    width: int
    rank: int
    targets: tuple[str, ...]
    what: str


def _roberta(layers: int) -> nn.Module:
    config = hf.RobertaConfig(
        vocab_size=1000,
        num_hidden_layers=layers,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return hf.RobertaForSequenceClassification(config)


def _vit(layers: int) -> nn.Module:
    return hf.ViTForImageClassification(hf.ViTConfig(num_hidden_layers=layers))


def _llama(layers: int) -> nn.Module:
    return hf.LlamaForCausalLM(
        hf.LlamaConfig(
            vocab_size=1000, hidden_size=1024, intermediate_size=2816, num_hidden_layers=layers, num_attention_heads=16,
            num_key_value_heads=16,
        )
    )  # fmt: skip


def _smollm2(layers: int) -> nn.Module:
    return hf.LlamaForCausalLM(
        hf.LlamaConfig(
            vocab_size=1000, hidden_size=576, intermediate_size=1536, num_hidden_layers=layers, num_attention_heads=9,
            num_key_value_heads=3, tie_word_embeddings=True,
        )
    )  # fmt: skip


_LLAMA_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

SHAPES = {
    "roberta-base": Shape(
        _roberta, 12, 3, (16, 128), 768, 1024, ("query", "value"), "RoBERTa-base, query and value"
    ),
    "vit-base": Shape(
        _vit, 12, 2, (16, 197), 768, 256, ("q_proj", "v_proj"), "ViT-B/16, query and value"
    ),
    "llama-1024": Shape(
        _llama,
        4,
        2,
        (4, 512),
        1024,
        1024,
        _LLAMA_LINEAR,
        "a Llama of 4 layers, 1024 wide, all linear layers",
    ),
    "smollm2-135m": Shape(
        _smollm2, 30, 4, (4, 512), 576, 256, _LLAMA_LINEAR, "SmolLM2-135M, all linear layers"
    ),
}


def shape_of(model: str) -> Shape:
    """A model of the benchmark by its name. Raises ConfigError naming the known ones."""
    if model not in SHAPES:
        raise ConfigError(
            f"no benchmark model {model!r}; there are {', '.join(SHAPES)}{near(model, SHAPES)}"
        )
    return SHAPES[model]


def step(
    model: str,
    *,
    rank: int | None = None,
    layers: int | None = None,
    peers: Sequence[Peer] | None = None,
    timing: Timing = DEFAULT_TIMING,
    log: Callable[[str], Any] = lambda text: None,
) -> list[dict[str, Any]]:
    """One whole-model row of the benchmark: a line for each contestant.

    layers: how many of the model's blocks to build (all); timing: seconds, clock and company; log: hears what is going on. Every contestant takes the same embedded inputs, with a gradient to them.
    Raises ConfigError for an unknown model.
    """
    shape = shape_of(model)
    layers, rank = layers or shape.layers, rank or shape.rank
    chosen = peers or (*OTHERS, Peer("peft-vera", rank), Peer(OURS, rank))
    torch.manual_seed(0)
    log(f"building {shape.what}: {layers} of {shape.layers} layers")
    base = shape.make(layers)
    lines: dict[str, dict[str, Any]] = {}
    runs = {}
    for peer in chosen:
        log(f"{peer.name}: counting")
        adapted_model = adapted(base, peer, shape.targets)
        forward = _forward(adapted_model, shape)
        runs[peer.name] = _step(adapted_model, forward)
        lines[peer.name] = {
            "model": model, "layers": layers, "batch": list(shape.batch), "method": peer.kind, "rank": peer.rank, "plan": peer.plan,
            "basis": peer.basis, "trained": sum(p.numel() for p in adapted_model.parameters() if p.requires_grad),
            "flops": flops(runs[peer.name]), "saved_bytes": saved_bytes(forward, adapted_model),
            "peak_bytes": peak_bytes(runs[peer.name]),
        }  # fmt: skip
    begin = time.perf_counter()
    log("measuring times in turns")
    times = timing.measure(runs)
    log(f"measured for {time.perf_counter() - begin:.0f} s")
    limit, where = lines[FROZEN]["flops"], timing.describe() | describe_machine()
    return [
        {
            **line,
            **summary(times[name], times[FROZEN]),
            "flops_beyond_frozen": line["flops"] - limit,
            **where,
        }
        for name, line in lines.items()
    ]


def _forward(model: nn.Module, shape: Shape) -> Callable[[], Any]:
    generator = torch.Generator().manual_seed(0)
    rows, length = shape.batch
    if shape.make is _vit:
        pixels = torch.randn(rows, 3, 224, 224, generator=generator)
        labels = torch.randint(2, (rows,), generator=generator)
        return lambda: model(pixel_values=pixels.detach().requires_grad_(), labels=labels).loss
    embedded = torch.randn(rows, length, shape.width, generator=generator) * 0.02
    size = (rows,) if shape.make is _roberta else (rows, length)
    labels = torch.randint(2 if shape.make is _roberta else 1000, size, generator=generator)
    return lambda: model(inputs_embeds=embedded.detach().requires_grad_(), labels=labels).loss


def _step(model: nn.Module, forward: Callable[[], Any]) -> Callable[[], None]:
    def run() -> None:
        forward().backward()
        model.zero_grad()

    return run
