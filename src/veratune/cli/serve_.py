"""veratune serve"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from jsonargparse import Namespace
from rich.console import Console

from veratune.cli.parsing import Parser, new_parser, parse

if TYPE_CHECKING:
    from veratune.serving.encoder import Encoder
    from veratune.serving.engine import Engine
    from veratune.serving.jobs import Base
    from veratune.serving.service import Service


def parser() -> Parser:
    out = new_parser("serve", "Serve a base model with the adapters of many tenants behind an OpenAI-compatible API.")
    out.add_argument("--model", type=str | None, default=None, help="causal base model: folder, .gguf file or Hugging Face id")
    out.add_argument("--name", type=str, default="", help="what clients call it; default its id or folder's name")
    out.add_argument(
        "--encoder", type=str | None, default=None, help="base model for embeddings and classes: folder or Hugging Face id"
    )
    out.add_argument("--encoder_name", type=str, default="", help="what clients call it; default its id or folder's name")
    out.add_argument(
        "--store",
        type=str,
        default="out/adapters.db",
        help="a SQLite file, or the URL of a bucket: s3://, gs://, az://, file://",
    )
    out.add_argument(
        "--adapters", type=list[str], default=[], help="NAME=FILE of adapters to put into the store first, for tenant default"
    )
    out.add_argument(
        "--key_file", type=str | None, default=None, help="file of keys (veratune key); without it only this machine may ask"
    )
    out.add_argument(
        "--host", type=str, default="127.0.0.1", help="address to listen on; another than this machine's wants keys"
    )
    out.add_argument("--port", type=int, default=8000, help="port to listen on; 0 takes a free one")
    out.add_argument("--slots", type=int, default=256, help="adapters in memory, of each kind")
    out.add_argument("--slots_dtype", type=Literal["float32", "bfloat16"], default="float32", help="of the adapters in memory")
    out.add_argument("--rows", type=int, default=32, help="conversations at once")
    out.add_argument("--waiting", type=int, default=512, help="requests that may wait")
    out.add_argument("--waiting_tenant", type=int, default=64, help="requests of one tenant that may wait")
    out.add_argument("--length", type=int, default=2048, help="tokens of a prompt and its answer together, at most")
    out.add_argument("--chunk", type=int, default=256, help="tokens of a prompt that are read in one step")
    out.add_argument(
        "--base_dtype", type=Literal["float32", "bfloat16", "float16"], default="float32", help="of the base model"
    )
    out.add_argument("--quantize", type=Literal["4bit", "8bit"] | None, default=None, help="load the base with bitsandbytes")
    out.add_argument(
        "--jobs", type=str | None, default=None, help="folder of fine-tuning jobs; without it the server does not fine-tune"
    )
    out.add_argument("--drain", type=float, default=30.0, help="seconds that answers have to end after SIGTERM")
    out.add_argument("--threads", type=int | None, default=None, help="threads for torch")
    out.add_argument("--device", type=Literal["auto", "cpu"], default="auto", help="auto takes a GPU if there is one")
    return out


def run(argv: Sequence[str]) -> int:
    flags = parse(parser(), argv)
    import torch
    import uvicorn

    from veratune.errors import ConfigError
    from veratune.serving.http import build, check_address, log_to_stderr
    from veratune.serving.jobs import Jobs
    from veratune.serving.keys import OPEN, Keys
    from veratune.serving.service import Service
    from veratune.serving.store import CachedStore, ObjectStore, SqliteStore

    keys = Keys(flags.key_file)
    check_address(flags.host, keys)
    given = [entry.partition("=") for entry in flags.adapters]
    for name, sign, file in given:
        if not sign or not Path(file).is_file():
            raise ConfigError(f"--adapters {name}{sign}{file}: NAME=FILE of an adapter's file is wanted")
    if flags.model is None and flags.encoder is None:
        raise ConfigError("there is nothing to serve: give --model, --encoder, or both")
    if flags.threads is not None:
        torch.set_num_threads(flags.threads)
    notes = Console(stderr=True, highlight=False)
    store: SqliteStore | CachedStore
    if "://" in flags.store:
        store = CachedStore(ObjectStore.from_url(flags.store), SqliteStore("out/adapter-cache.db"))
    else:
        store = SqliteStore(flags.store)
    engine, encoder = load(flags, notes)
    service = Service(store, engine, encoder, name=flags.name, encoder_name=flags.encoder_name)
    for name, _, file in given:
        service.put(OPEN.tenant, name, Path(file).read_bytes())
    jobs = Jobs(flags.jobs, _bases(flags, service), service.put) if flags.jobs else None
    logging.getLogger("veratune").setLevel(logging.INFO)
    log_to_stderr()
    for loop in service.loops.values():
        loop.start()
    if jobs is not None:
        jobs.start()
    who = f"keys in {flags.key_file}" if flags.key_file else "no keys"
    notes.print(
        f"[bold]{', '.join(service.loops)}[/bold] on http://{flags.host}:{flags.port} (API under /v1), adapters in {flags.store}, {who}"
    )
    try:
        config = uvicorn.Config(
            build(service, keys, jobs),
            host=flags.host,
            port=flags.port,
            log_level="warning",
            timeout_graceful_shutdown=int(flags.drain) or None,
        )
        uvicorn.Server(config).run()
    finally:
        service.close(flags.drain)
        if jobs is not None:
            jobs.close()
        store.close()
    return 0


def load(flags: Namespace, notes: Console) -> "tuple[Engine | None, Encoder | None]":
    """The engines that flags name, with their models."""
    import torch

    from veratune.serving.bank import Bank
    from veratune.serving.encoder import Encoder
    from veratune.serving.engine import Engine
    from veratune.serving.scheduler import Limits
    from veratune.tasks.language import Instruction
    from veratune.tasks.text_classification import TextClassification

    limits = Limits(rows=flags.rows, waiting=flags.waiting, waiting_tenant=flags.waiting_tenant)
    loops: dict[str, Any] = {}
    tasks = {"model": Instruction(), "encoder": TextClassification(labels=["0", "1"])}
    for kind, task in tasks.items():
        folder = getattr(flags, kind)
        if folder is None:
            continue
        notes.print(f"loading {folder} ...")
        tokenizer = task.load_processor(folder)
        model = task.load_model(folder, tokenizer, dtype=flags.base_dtype, quantize=flags.quantize).requires_grad_(False).eval()
        if flags.device == "auto" and torch.cuda.is_available() and flags.quantize is None:
            model.cuda()
        bank = Bank(model, slots=max(flags.slots, flags.rows), dtype=getattr(torch, flags.slots_dtype))
        if kind == "model":
            loops[kind] = Engine(model, tokenizer, bank, limits=limits, length=flags.length, chunk=flags.chunk)
        else:
            loops[kind] = Encoder(model, tokenizer, bank, limits=limits)
    return loops.get("model"), loops.get("encoder")


def _bases(flags: Namespace, service: "Service") -> "dict[str, Base]":
    """What can be fine-tuned: the base models that are served."""
    from veratune.serving.jobs import Base

    found = {}
    for name, loop in service.loops.items():
        if loop is service.engine:
            found[name] = Base(flags.model, "instruction", (("messages",), ("prompt", "completion")))
        else:
            found[name] = Base(flags.encoder, "text-classification", (("text", "label"),))
    return found
