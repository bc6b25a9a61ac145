"""veratune serve"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from rich.console import Console

from veratune.cli.parsing import Parser, new_parser, parse


def parser() -> Parser:
    out = new_parser("serve", "Serve a base model with the adapters of many tenants behind an OpenAI-compatible API.")
    out.add_argument("--model", type=str, required=True, help="base model: folder, .gguf file or Hugging Face id")
    out.add_argument(
        "--name", type=str | None, default=None, help="what clients call the base model; default its id or folder's name"
    )
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
    out.add_argument("--drain", type=float, default=30.0, help="seconds that answers have to end after SIGTERM")
    out.add_argument("--threads", type=int | None, default=None, help="threads for torch")
    out.add_argument("--device", type=Literal["auto", "cpu"], default="auto", help="auto takes a GPU if there is one")
    return out


def run(argv: Sequence[str]) -> int:
    flags = parse(parser(), argv)
    import torch
    import uvicorn

    from veratune.errors import ConfigError
    from veratune.serving.bank import Bank
    from veratune.serving.engine import Engine
    from veratune.serving.http import build, check_address
    from veratune.serving.keys import OPEN, Keys
    from veratune.serving.scheduler import Limits
    from veratune.serving.service import Service
    from veratune.serving.store import CachedStore, ObjectStore, SqliteStore
    from veratune.tasks.language import Instruction

    keys = Keys(flags.key_file)
    check_address(flags.host, keys)
    given = [entry.partition("=") for entry in flags.adapters]
    for name, sign, file in given:
        if not sign or not Path(file).is_file():
            raise ConfigError(f"--adapters {name}{sign}{file}: NAME=FILE of an adapter's file is wanted")
    limits = Limits(rows=flags.rows, waiting=flags.waiting, waiting_tenant=flags.waiting_tenant)
    if flags.threads is not None:
        torch.set_num_threads(flags.threads)
    notes = Console(stderr=True, highlight=False)
    notes.print(f"loading {flags.model} ...")
    task = Instruction()
    tokenizer = task.load_processor(flags.model)
    model = (
        task.load_model(flags.model, tokenizer, dtype=flags.base_dtype, quantize=flags.quantize).requires_grad_(False).eval()
    )
    if flags.device == "auto" and torch.cuda.is_available() and flags.quantize is None:
        model.cuda()
    bank = Bank(model, slots=max(flags.slots, flags.rows), dtype=getattr(torch, flags.slots_dtype))
    engine = Engine(model, tokenizer, bank, limits=limits, length=flags.length, chunk=flags.chunk)
    store: SqliteStore | CachedStore
    if "://" in flags.store:
        store = CachedStore(ObjectStore.from_url(flags.store), SqliteStore("out/adapter-cache.db"))
    else:
        store = SqliteStore(flags.store)
    service = Service(engine, store, flags.name)
    for name, _, file in given:
        service.put(OPEN.tenant, name, Path(file).read_bytes())
    engine.start()
    logging.getLogger("veratune").setLevel(logging.INFO)
    notes.print(
        f"[bold]{service.name}[/bold] on http://{flags.host}:{flags.port}/v1, adapters in {flags.store}, {'keys in ' + flags.key_file if flags.key_file else 'no keys'}"
    )
    try:
        config = uvicorn.Config(
            build(service, keys),
            host=flags.host,
            port=flags.port,
            log_level="warning",
            timeout_graceful_shutdown=int(flags.drain) or None,
        )
        uvicorn.Server(config).run()
    finally:
        engine.close(flags.drain)
        store.close()
    return 0
