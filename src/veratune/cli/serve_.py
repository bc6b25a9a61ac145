"""The command veratune serve."""

import contextlib
import functools
import logging
import os
import signal
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from jsonargparse import Namespace
from jsonargparse.typing import PositiveInt, restricted_number_type
from rich.console import Console

from veratune.cli.parsing import Parser, new_parser, parse

if TYPE_CHECKING:
    from fastapi import FastAPI

    from veratune.serving.engine.encoder import Encoder
    from veratune.serving.engine.engine import Engine
    from veratune.serving.jobs.jobs import Base
    from veratune.serving.service import Service

Port = restricted_number_type("Port", int, [(">=", 0), ("<", 65536)])
Seconds = restricted_number_type("Seconds", float, [(">=", 0), ("<", 10**7)])
GiB = restricted_number_type("GiB", float, [(">=", 0), ("<", 2**20)])


def parser() -> Parser:
    out = new_parser(
        "serve",
        "Serve a base model with the adapters of many tenants behind an OpenAI-compatible API.",
    )
    out.add_argument(
        "--model",
        type=str | None,
        default=None,
        help="causal base model: folder, .gguf file or Hugging Face id",
    )
    out.add_argument(
        "--served-model-name",
        type=str,
        default="",
        help="what clients call it; default its id or folder's name",
    )
    out.add_argument(
        "--encoder",
        type=str | None,
        default=None,
        help="base model for embeddings and classes: folder or Hugging Face id",
    )
    out.add_argument(
        "--served-encoder-name",
        type=str,
        default="",
        help="what clients call it; default its id or folder's name",
    )
    out.add_argument(
        "--store",
        type=str,
        default="out/adapters.db",
        help="a SQLite file, or the URL of a bucket: s3://, gs://, az://, file://",
    )
    out.add_argument(
        "--cache",
        type=str,
        default="out/adapter-cache.db",
        help="a bucket's adapters on this machine: a SQLite file",
    )
    out.add_argument(
        "--refresh-seconds",
        type=Seconds,
        default=2.0,
        help="seconds until a bucket is asked again which version of an adapter is the newest",
    )
    out.add_argument(
        "--adapters",
        type=list[str],
        default=[],
        help="NAME=FILE of adapters to put into the store first, for tenant default",
    )
    out.add_argument(
        "--key-file",
        type=str | None,
        default=None,
        help="file of keys (veratune key); without it only this machine may ask",
    )
    out.add_argument(
        "--host",
        type=str,
        default="127.0.0.1",
        help="address to listen on; another than this machine's wants keys",
    )
    out.add_argument(
        "--port", type=Port, default=8000, help="port to listen on; 0 takes a free one"
    )
    out.add_argument(
        "--max-loaded-adapters",
        type=PositiveInt,
        default=256,
        help="adapters in memory, of each kind",
    )
    out.add_argument(
        "--adapter-dtype",
        type=Literal["float32", "bfloat16"],
        default="float32",
        help="of the adapters in memory",
    )
    out.add_argument(
        "--adapter-memory-gib",
        type=GiB,
        default=4.0,
        help="GiB of adapters in memory, with the frozen matrices of all kinds",
    )
    out.add_argument(
        "--max-rank",
        type=PositiveInt,
        default=4096,
        help="the largest rank of an adapter that is taken",
    )
    out.add_argument("--max-num-seqs", type=PositiveInt, default=32, help="conversations at once")
    out.add_argument("--max-queue", type=PositiveInt, default=512, help="requests that may wait")
    out.add_argument(
        "--max-queue-per-tenant",
        type=PositiveInt,
        default=64,
        help="requests of one tenant that may wait",
    )
    out.add_argument(
        "--max-model-len",
        type=PositiveInt,
        default=2048,
        help="tokens of a prompt and its answer together, at most",
    )
    out.add_argument(
        "--max-num-batched-tokens",
        type=PositiveInt,
        default=256,
        help="tokens of a prompt that are read in one step",
    )
    out.add_argument(
        "--prefix-cache-gib",
        type=GiB,
        default=1.0,
        help="GiB of keys and values that are kept for a tenant's next request that begins alike; 0 for none",
    )
    out.add_argument(
        "--dtype",
        type=Literal["float32", "bfloat16", "float16"],
        default="float32",
        help="of the base model",
    )
    out.add_argument(
        "--quantize",
        type=Literal["4bit", "8bit"] | None,
        default=None,
        help="load the base with bitsandbytes",
    )
    out.add_argument(
        "--jobs",
        type=str | None,
        default=None,
        help="folder of fine-tuning jobs; without it the server does not fine-tune",
    )
    out.add_argument(
        "--replicas",
        type=PositiveInt,
        default=1,
        help="over 1: so many servers behind one address, by Ray Serve; they share the store",
    )
    out.add_argument(
        "--shutdown-timeout",
        type=Seconds,
        default=30.0,
        help="seconds that answers have to end after SIGTERM",
    )
    out.add_argument("--threads", type=PositiveInt | None, default=None, help="threads for torch")
    out.add_argument(
        "--device",
        type=Literal["auto", "cpu"],
        default="auto",
        help="auto takes a GPU if there is one",
    )
    return out


def run(argv: Sequence[str]) -> int:
    flags = parse(parser(), argv)
    import uvicorn

    from veratune.errors import ConfigError
    from veratune.serving.engine.loop import run_in_temporary_thread
    from veratune.serving.http.app import build, check_address
    from veratune.serving.jobs.jobs import Jobs
    from veratune.serving.keys import Keys

    keys = Keys(flags.key_file)
    check_address(flags.host, keys)
    for name, sign, file in _given(flags):
        if not sign or not Path(file).is_file():
            raise ConfigError(
                f"--adapters {name}{sign}{file}: NAME=FILE of an adapter's file is wanted"
            )
    if flags.model is None and flags.encoder is None:
        raise ConfigError("there is nothing to serve: give --model, --encoder, or both")
    taken = _bind(
        flags.host, flags.port
    )  # before models are loaded: who has the address wrong learns it at once
    flags.port = taken.getsockname()[1]
    if flags.replicas > 1:
        taken.close()
        return _replicas(flags)
    notes = Console(stderr=True, highlight=False)
    service = run_in_temporary_thread(lambda: start(flags, notes))
    jobs = Jobs(flags.jobs, _bases(flags, service), service.keep) if flags.jobs else None
    for loop in service.loops.values():
        loop.start()
    if jobs is not None:
        jobs.start()
    _say(flags, list(service.loops), notes)
    try:
        config = uvicorn.Config(
            build(service, keys, jobs),
            log_level="warning",
            timeout_graceful_shutdown=int(flags.shutdown_timeout) or None,
        )
        # uvicorn raises the signal that ended it again, and a job's process must not be left behind by a SIGTERM either.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        with contextlib.suppress(KeyboardInterrupt):
            uvicorn.Server(config).run(sockets=[taken])
    finally:
        service.close(flags.shutdown_timeout)
        if jobs is not None:
            jobs.close()
        service.store.close()
    return 0


def _bind(host: str, port: int) -> socket.socket:
    """A socket at an address, which nobody can connect to yet. Raises ConfigError."""
    from veratune.errors import ConfigError

    made = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        made.bind((host, port))
    except OSError as error:
        made.close()
        raise ConfigError(
            f"port {port} of {host} cannot be had: {error.strerror}; give another --port (0 takes a free one) or --host"
        ) from None
    return made


def start(flags: Namespace, notes: Console) -> "Service":
    """The service that flags describe: its store, with the adapters that were given, and its engines, which do not run yet."""
    import torch

    from veratune.serving.http.app import log_to_stderr
    from veratune.serving.keys import OPEN
    from veratune.serving.service import Service
    from veratune.serving.store.cached import CachedStore
    from veratune.serving.store.object import ObjectStore
    from veratune.serving.store.sqlite import SqliteStore

    if flags.threads is not None:
        torch.set_num_threads(flags.threads)
    logging.getLogger("veratune").setLevel(logging.INFO)
    log_to_stderr()
    store: SqliteStore | CachedStore
    if "://" in flags.store:
        store = CachedStore(
            ObjectStore.from_url(flags.store),
            SqliteStore(flags.cache),
            refresh_seconds=flags.refresh_seconds,
        )
    else:
        store = SqliteStore(flags.store)
    engine, encoder = load(flags, notes)
    service = Service(
        store, engine, encoder, name=flags.served_model_name, encoder_name=flags.served_encoder_name
    )
    for name, _, file in _given(flags):
        service.keep(OPEN.tenant, name, Path(file).read_bytes())
    return service


def _replicas(flags: Namespace) -> int:
    from veratune.errors import ConfigError
    from veratune.serving import cluster

    if flags.jobs:
        raise ConfigError(
            "--jobs: replicas keep nothing, so they do not fine-tune; start one server with --jobs on the same store"
        )
    if "RAY_ADDRESS" in os.environ and "://" not in flags.store:
        raise ConfigError(
            f"--store {flags.store}: replicas on several machines share a bucket, such as s3://, gs:// or az://"
        )
    notes = Console(stderr=True, highlight=False)
    notes.print(f"starting {flags.replicas} replicas ...")
    cluster.start(
        functools.partial(_replica, flags), replicas=flags.replicas, host=flags.host, port=flags.port, key_file=flags.key_file, rows=flags.max_num_seqs,
        waiting=flags.max_queue,
    )  # fmt: skip
    _say(flags, [Path(given).name for given in (flags.model, flags.encoder) if given], notes)
    cluster.wait()
    return 0


def _replica(flags: Namespace) -> "tuple[Service, FastAPI]":
    """One of several servers, in a process of its own."""
    from veratune.cli.main import quiet
    from veratune.serving.http.app import build
    from veratune.serving.keys import Keys

    quiet()
    service = start(flags, Console(stderr=True, highlight=False))
    return service, build(service, Keys(flags.key_file))


def _given(flags: Namespace) -> list[tuple[str, str, str]]:
    return [entry.partition("=") for entry in flags.adapters]


def _say(flags: Namespace, names: Sequence[str], notes: Console) -> None:
    who = f"keys in {flags.key_file}" if flags.key_file else "no keys"
    notes.print(
        f"[bold]{', '.join(names)}[/bold] on http://{flags.host}:{flags.port} (API under /v1), adapters in {flags.store}, {who}"
    )


def load(flags: Namespace, notes: Console) -> "tuple[Engine | None, Encoder | None]":
    """The engines that flags name, with their models."""
    import torch

    from veratune.serving.engine.encoder import Encoder
    from veratune.serving.engine.engine import Engine
    from veratune.serving.engine.scheduler import SchedulerConfig
    from veratune.serving.pool.pool import AdapterPool
    from veratune.tasks.text.classification import TextClassification
    from veratune.tasks.text.language import Instruction

    limits = SchedulerConfig(
        max_num_seqs=flags.max_num_seqs,
        max_queue=flags.max_queue,
        max_queue_per_tenant=flags.max_queue_per_tenant,
    )
    loops: dict[str, Any] = {}
    tasks = {"model": Instruction(), "encoder": TextClassification(labels=["0", "1"])}
    for kind, task in tasks.items():
        folder = getattr(flags, kind)
        if folder is None:
            continue
        notes.print(f"loading {folder} ...")
        tokenizer = task.load_processor(folder)
        model = (
            task.load_model(folder, tokenizer, dtype=flags.dtype, quantize=flags.quantize)
            .requires_grad_(False)
            .eval()
        )
        if flags.device == "auto" and torch.cuda.is_available() and flags.quantize is None:
            model.cuda()
        pool = AdapterPool(
            model, slots=max(flags.max_loaded_adapters, flags.max_num_seqs), dtype=getattr(torch, flags.adapter_dtype), max_bytes=int(flags.adapter_memory_gib * 2**30),
            max_rank=flags.max_rank,
        )  # fmt: skip
        if kind == "model":
            loops[kind] = Engine(
                model,
                tokenizer,
                pool,
                config=limits,
                max_model_len=flags.max_model_len,
                max_num_batched_tokens=flags.max_num_batched_tokens,
                prefix_cache_bytes=int(flags.prefix_cache_gib * 2**30),
            )
        else:
            loops[kind] = Encoder(model, tokenizer, pool, config=limits)
    return loops.get("model"), loops.get("encoder")


def _bases(flags: Namespace, service: "Service") -> "dict[str, Base]":
    """What can be fine-tuned: the base models that are served."""
    from veratune.serving.jobs.jobs import Base

    found = {}
    for name, loop in service.loops.items():
        if loop is service.engine:
            found[name] = Base(
                flags.model, "instruction", (("messages",), ("prompt", "completion"))
            )
        else:
            found[name] = Base(flags.encoder, "text-classification", (("text", "label"),))
    return found
