"""ServeConfig: the settings of the server, which are the flags of `veratune serve`."""

import dataclasses
import math
import os
from pathlib import Path
from typing import Literal

import torch

from veratune.errors import ConfigError
from veratune.formats.hub import is_address, parse_address
from veratune.serving.feedback.repository import HELD_OUT_EVERY
from veratune.serving.http.config import HttpConfig
from veratune.serving.http.tracing import check_endpoint


@dataclasses.dataclass(kw_only=True)
class ServeConfig:
    """Settings of the server.

    Args:
        model: causal base model: folder, .gguf file or Hugging Face id
        served_model_name: its name for clients; default its id or folder's name
        encoder: base model for embeddings and classes: folder or Hugging Face id
        served_encoder_name: its name for clients; default its id or folder's name
        store: where adapters are kept: a SQLite file, or a bucket: s3://, gs://, az://, file://
        cache: SQLite file that caches a bucket's adapters on this machine
        refresh_seconds: how long the newest version of a bucket's adapter is cached
        adapters: NAME=FILE or NAME=hf://user/repo of adapters to publish at the start, for the
            tenant "default"
        key_file: file of API keys (veratune key); without it only this machine may call
        host: address to listen on; one that other machines reach requires keys
        port: port to listen on; 0 takes a free one
        max_loaded_adapters: adapters in memory, of each kind (basis, layers, ranks)
        adapter_dtype: dtype of adapters in memory
        adapter_memory_gib: GiB of adapters in memory, with A and B of all kinds
        merged_adapter_gib: GiB for W + ΔW of the one adapter that whole batches use, so that it
            costs what the base model costs; of each base model, float32 only, 0 for none
        max_rank: largest rank of an adapter
        max_num_seqs: sequences that are decoded at once
        max_queue: requests that may wait
        max_queue_per_tenant: requests of one tenant that may wait
        max_model_len: tokens of a prompt and its completion together
        max_num_batched_tokens: prompt tokens that are computed in one step
        prefix_cache_gib: GiB of KV cache kept for later requests that begin alike; 0 for none
        max_requests_per_minute: API calls of one tenant in a minute; more get 429
        max_tokens_per_minute: prompt tokens and max_tokens of one tenant in a minute
        max_jobs_per_tenant: fine-tuning jobs of one tenant that may be queued or running
        cors_origins: origins of web pages that may call the API, such as https://app.example.com
        allowed_hosts: host names that a server without keys answers to, besides this machine's
        adapter_sources: folders, or hub addresses such as hf://user/, that clients may load
            adapters from by /v1/load_lora_adapter
        metrics: serve Prometheus metrics at /metrics
        openapi: serve the API's description at /openapi.json
        otlp_traces_endpoint: OTLP/HTTP address of an OpenTelemetry collector, such as
            http://localhost:4318/v1/traces; gets a trace of each call, without its texts
        dtype: dtype of the base models
        quantize: load the base models with bitsandbytes
        attn_implementation: attention of transformers; default: the model's own, mostly sdpa.
            flash_attention_2 serves encoders on a GPU alone
        jobs: folder of fine-tuning jobs and feedback; without it the server does not fine-tune
        train_after: new feedback examples of an adapter that start its training; 0: only
            `veratune train-feedback` trains
        feedback_config: YAML file of settings of `veratune train-feedback`, such as lr and rank
        replicas: over 1: that many servers behind one address by Ray Serve, on one store
        shutdown_timeout: seconds for running requests to finish after SIGTERM
        threads: threads of torch
        device: auto takes a GPU if there is one
    """

    model: str | None = None
    served_model_name: str = ""
    encoder: str | None = None
    served_encoder_name: str = ""
    store: str = "out/adapters.db"
    cache: str = "out/adapter-cache.db"
    refresh_seconds: float = 2.0
    adapters: list[str] = dataclasses.field(default_factory=list)
    key_file: str | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    max_loaded_adapters: int = 256
    adapter_dtype: Literal["float32", "bfloat16"] = "float32"
    adapter_memory_gib: float = 4.0
    merged_adapter_gib: float = 1.0
    max_rank: int = 4096
    max_num_seqs: int = 32
    max_queue: int = 512
    max_queue_per_tenant: int = 64
    max_model_len: int = 2048
    max_num_batched_tokens: int = 256
    prefix_cache_gib: float = 1.0
    max_requests_per_minute: int | None = None
    max_tokens_per_minute: int | None = None
    max_jobs_per_tenant: int = 16
    cors_origins: list[str] = dataclasses.field(default_factory=list)
    allowed_hosts: list[str] = dataclasses.field(default_factory=list)
    adapter_sources: list[str] = dataclasses.field(default_factory=list)
    metrics: bool = True
    openapi: bool = True
    otlp_traces_endpoint: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    quantize: Literal["4bit", "8bit"] | None = None
    attn_implementation: Literal["eager", "sdpa", "flash_attention_2"] | None = None
    jobs: str | None = None
    train_after: int = 0
    feedback_config: str | None = None
    replicas: int = 1
    shutdown_timeout: float = 30.0
    threads: int | None = None
    device: Literal["auto", "cpu"] = "auto"

    def __post_init__(self) -> None:
        """Check numbers and combinations. Raises ConfigError."""
        counts = (
            "max_loaded_adapters max_rank max_num_seqs max_queue max_queue_per_tenant "
            "max_model_len max_num_batched_tokens max_requests_per_minute "
            "max_tokens_per_minute max_jobs_per_tenant replicas threads"
        )
        bounds = dict.fromkeys(counts.split(), (1, 2**53)) | {
            "port": (0, 65535),
            "train_after": (0, 2**31),
            "refresh_seconds": (0, 10**7),
            "shutdown_timeout": (0, 10**7),
            "adapter_memory_gib": (0, 2**20),
            "merged_adapter_gib": (0, 2**20),
            "prefix_cache_gib": (0, 2**20),
        }
        for name, (least, most) in bounds.items():
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and least <= value <= most):
                raise ConfigError(f"{name} is {value}; {least} to {most} is wanted")
        if self.model is None and self.encoder is None:
            raise ConfigError("there is nothing to serve: give --model, --encoder, or both")
        self._check_attention()
        if self.train_after and not (self.jobs and self.model):
            raise ConfigError("--train-after: give --jobs and --model too, which it trains")
        if self.train_after and self.train_after < HELD_OUT_EVERY:
            raise ConfigError(
                f"train_after is {self.train_after}; 0, or at least {HELD_OUT_EVERY} is wanted"
            )
        if self.feedback_config is not None and not Path(self.feedback_config).is_file():
            raise ConfigError(f"--feedback-config {self.feedback_config}: there is no such file")
        for name, file in self.adapter_files():
            if is_address(file):
                parse_address(file)
            if not name or not file:
                raise ConfigError(
                    f"--adapters {name}={file}: NAME=FILE of an adapter's file is wanted"
                )
            if not is_address(file) and not Path(file).is_file():
                raise ConfigError(f"--adapters {name}={file}: there is no file {file}")
        if self.otlp_traces_endpoint is not None:
            check_endpoint(self.otlp_traces_endpoint)
        for source in self.adapter_sources:
            if not is_address(source) and not Path(source).is_dir():
                raise ConfigError(f"--adapter-sources {source}: there is no such folder")
        if self.replicas > 1 and self.jobs:
            raise ConfigError(
                "--jobs: replicas keep nothing, so they do not fine-tune; start one server with "
                "--jobs on the same store"
            )
        if self.replicas > 1 and "RAY_ADDRESS" in os.environ and "://" not in self.store:
            raise ConfigError(
                f"--store {self.store}: replicas on several machines share a bucket, such as "
                "s3://, gs:// or az://"
            )

    def _check_attention(self) -> None:
        if self.attn_implementation != "flash_attention_2":
            return
        if self.model is not None:
            raise ConfigError(
                "attn_implementation is flash_attention_2, which takes no mask; sequences of a "
                "batch have different lengths here, so --model wants sdpa or eager"
            )
        if self.device == "cpu" or not torch.cuda.is_available():
            raise ConfigError(
                "attn_implementation is flash_attention_2, which needs a GPU; sdpa is wanted"
            )

    def adapter_files(self) -> list[tuple[str, str]]:
        """(name, file) of the adapters to publish at the start."""
        entries = (entry.partition("=") for entry in self.adapters)
        return [(name, file) for name, _, file in entries]

    def http(self) -> HttpConfig:
        """The HTTP application's settings."""
        return HttpConfig(
            max_requests_per_minute=self.max_requests_per_minute,
            max_tokens_per_minute=self.max_tokens_per_minute,
            cors_origins=tuple(self.cors_origins),
            allowed_hosts=tuple(self.allowed_hosts),
            adapter_sources=tuple(self.adapter_sources),
            metrics=self.metrics,
            openapi=self.openapi,
            otlp_traces_endpoint=self.otlp_traces_endpoint,
        )
