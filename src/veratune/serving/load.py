"""Base models of the server: from disk or the hub into an engine."""

import logging

import torch
from torch import nn

from veratune.serving.config import ServeConfig
from veratune.serving.engine.encoder import Encoder
from veratune.serving.engine.engine import Engine
from veratune.serving.engine.scheduler import SchedulerConfig
from veratune.serving.pool.pool import AdapterPool
from veratune.tasks.text.classification import TextClassification
from veratune.tasks.text.language import Instruction

log = logging.getLogger(__name__)


def load_engine(config: ServeConfig) -> Engine:
    """Load the causal model.

    Args:
        config: Names the model and its bounds.

    Returns:
        Its engine, which does not run yet.
    """
    assert config.model is not None
    task = Instruction()
    log.info("loading %s", config.model)
    tokenizer = task.load_processor(config.model)
    model = task.load_model(config.model, tokenizer, **_options(config))
    return Engine(
        model,
        tokenizer,
        _pool(model, config),
        config=_scheduler(config),
        max_model_len=config.max_model_len,
        max_num_batched_tokens=config.max_num_batched_tokens,
        prefix_cache_bytes=int(config.prefix_cache_gib * 2**30),
    )


def load_encoder(config: ServeConfig) -> Encoder:
    """Load the encoder.

    Args:
        config: Names the model and its bounds.

    Returns:
        Its engine, which does not run yet.
    """
    assert config.encoder is not None
    task = TextClassification(labels=["0", "1"])  # adapters bring their own heads
    log.info("loading %s", config.encoder)
    tokenizer = task.load_processor(config.encoder)
    model = task.load_model(config.encoder, tokenizer, **_options(config))
    return Encoder(model, tokenizer, _pool(model, config), config=_scheduler(config))


def _options(config: ServeConfig) -> dict[str, str | None]:
    options: dict[str, str | None] = {"dtype": config.dtype, "quantize": config.quantize}
    if config.attn_implementation is not None:
        options["attn_implementation"] = config.attn_implementation
    return options


def _pool(model: nn.Module, config: ServeConfig) -> AdapterPool:
    model.requires_grad_(False).eval()
    if config.device == "auto" and torch.cuda.is_available() and config.quantize is None:
        model.cuda()
    return AdapterPool(
        model,
        slots=max(config.max_loaded_adapters, config.max_num_seqs),
        dtype=getattr(torch, config.adapter_dtype),
        max_bytes=int(config.adapter_memory_gib * 2**30),
        max_rank=config.max_rank,
        max_merged_bytes=int(config.merged_adapter_gib * 2**30),
    )


def _scheduler(config: ServeConfig) -> SchedulerConfig:
    return SchedulerConfig(
        max_num_seqs=config.max_num_seqs,
        max_queue=config.max_queue,
        max_queue_per_tenant=config.max_queue_per_tenant,
    )
