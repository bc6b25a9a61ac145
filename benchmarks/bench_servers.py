"""Tokens per second and time to first token of veratune's server beside others', on the same base
model.

    VERATUNE_LLAMA_PYTHON=.../python python benchmarks/bench_servers.py --model SMOLLM2 --data alpaca_9k

The others are `transformers serve`, with and without continuous batching, and llama.cpp's server
(llama-cpp-python[server]) with the GGUF of `--gguf`. All of them run at once; a round loads each in
turn with 1, 8 and 32 concurrent clients, who stream completions of Alpaca instructions that no
other round has. A server that does not start is named in the lines. Appends one line a round,
server and concurrency to results/servers.jsonl.
"""

import argparse
import asyncio
import contextlib
import dataclasses
import json
import os
import random
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai

LINES = Path(__file__).parent / "results" / "servers.jsonl"
PER_CLIENT = 2  # completions that each client asks for, one after the other
START_SECONDS = 180


@dataclasses.dataclass
class Server:
    """A running server.

    Attributes:
        name: What it is called in the lines.
        url: Its OpenAI-compatible API.
        model: The model's name there.
    """

    name: str
    url: str
    model: str


@dataclasses.dataclass
class Answer:
    """One streamed completion: seconds to its first text, and the text."""

    first: float
    text: str


def commands(model: str, gguf: str | None, dtype: str, threads: int) -> dict[str, list[str]]:
    """The command of each server; {port} stands for its port."""
    binary = str(Path(sys.executable).parent)
    veratune = [
        sys.executable,
        "-m",
        "veratune.cli.main",
        "serve",
        "--model",
        model,
        "--port",
        "{port}",
    ]
    transformers = [f"{binary}/transformers", "serve", model, "--port", "{port}", "--device", "cpu"]
    servers = {
        "veratune serve": [*veratune, "--dtype", dtype],
        "transformers serve": [*transformers, "--dtype", dtype],
        "transformers serve, continuous batching": [
            *transformers, "--dtype", dtype, "--continuous-batching",
        ],
    }  # fmt: skip
    if gguf is not None:
        python = os.environ["VERATUNE_LLAMA_PYTHON"]
        servers["llama.cpp server"] = [
            python, "-m", "llama_cpp.server", "--model", gguf, "--port", "{port}",
            "--n_threads", str(threads), "--interrupt_requests", "false",
        ]  # fmt: skip
    return servers


@contextlib.contextmanager
def running(name: str, words: list[str], threads: int, logs: Path) -> Iterator[Server | None]:
    """Start a server; None if it does not answer."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    log = (logs / f"{name}.log").open("w")
    process = subprocess.Popen(
        [word.replace("{port}", str(port)) for word in words],
        env=environment, stdout=log, stderr=subprocess.STDOUT,
    )  # fmt: skip
    url = f"http://127.0.0.1:{port}/v1"
    try:
        # The server of transformers lists the models of the cache, and is asked for the folder.
        yield _wait(name, url, process, words[2] if "transformers" in name else "")
    finally:
        process.terminate()
        process.wait(30)
        log.close()


def _wait(name: str, url: str, process: subprocess.Popen[bytes], model: str) -> Server | None:
    """The server, as soon as it completes one token."""
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end and process.poll() is None:
        with contextlib.suppress(OSError, ValueError, KeyError, IndexError, openai.OpenAIError):
            if not model:
                with urllib.request.urlopen(f"{url}/models", timeout=5) as answer:
                    model = json.load(answer)["data"][0]["id"]
            client = openai.OpenAI(base_url=url, api_key="none", timeout=60, max_retries=0)
            client.completions.create(model=model, prompt="Hello", max_tokens=1, temperature=0)
            return Server(name, url, model)
        time.sleep(1)
    return None


async def _complete(client: openai.AsyncOpenAI, model: str, prompt: str, tokens: int) -> Answer:
    start, first, text = time.perf_counter(), 0.0, ""
    stream = await client.completions.create(
        model=model, prompt=prompt, max_tokens=tokens, temperature=0, stream=True
    )
    async for chunk in stream:
        piece = chunk.choices[0].text if chunk.choices else ""
        if piece and not text:
            first = time.perf_counter() - start
        text += piece or ""
    return Answer(first, text)


async def load(
    server: Server, prompts: list[str], clients: int, tokens: int, tokenizer: Any
) -> dict[str, Any]:
    """So many clients at once, each with some completions one after the other."""
    waiting = list(prompts)
    answers: list[Answer] = []
    async with openai.AsyncOpenAI(
        base_url=server.url, api_key="none", timeout=600, max_retries=0
    ) as client:

        async def ask() -> None:
            while waiting:
                answers.append(await _complete(client, server.model, waiting.pop(), tokens))

        start = time.perf_counter()
        await asyncio.gather(*(ask() for _ in range(clients)))
        seconds = time.perf_counter() - start
    written = sum(len(tokenizer(answer.text)["input_ids"]) for answer in answers)
    first = [1e3 * answer.first for answer in answers]
    return {
        "completions": len(answers),
        "tokens": written,
        "seconds": round(seconds, 3),
        "tokens_per_second": round(written / seconds, 2),
        "first_token_p50_ms": round(float(np.percentile(first, 50)), 1),
        "first_token_p99_ms": round(float(np.percentile(first, 99)), 1),
    }


def instructions(data: str) -> list[str]:
    """Alpaca's instructions as prompts, in a fixed random order."""
    import pandas

    rows = pandas.read_parquet(Path(data) / "train.parquet")["instruction"].tolist()
    prompts = [f"{row.strip()}\n" for row in rows if 40 <= len(row) <= 200]
    random.Random(0).shuffle(prompts)
    return prompts


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--model", required=True, help="folder of SmolLM2-135M-Instruct")
    flags.add_argument("--data", required=True, help="folder of alpaca_9k")
    flags.add_argument("--gguf", help="the same model in the same dtype, for llama.cpp")
    flags.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    flags.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 32])
    flags.add_argument("--rounds", type=int, default=3)
    flags.add_argument("--tokens", type=int, default=32)
    flags.add_argument("--threads", type=int, default=2)
    flags.add_argument("--logs", type=Path, default=Path("/tmp"))
    flags.add_argument("--beside", default="nothing")
    options = flags.parse_args()
    from transformers import AutoTokenizer

    from veratune.analysis.machine import describe_machine

    tokenizer, prompts = AutoTokenizer.from_pretrained(options.model), instructions(options.data)
    about = {
        "model": "SmolLM2-135M-Instruct", "dtype": options.dtype, "answer_tokens": options.tokens,
        "beside": options.beside, **describe_machine(), "threads": options.threads,
    }  # fmt: skip
    with contextlib.ExitStack() as stack, LINES.open("a") as lines:
        servers: list[Server] = []
        for name, words in commands(
            options.model, options.gguf, options.dtype, options.threads
        ).items():
            server = stack.enter_context(running(name, words, options.threads, options.logs))
            if server is None:
                lines.write(json.dumps({"server": name, "started": False, **about}) + "\n")
                print(f"{name}: does not start; its log is in {options.logs}", file=sys.stderr)
            else:
                servers.append(server)
        for number in range(options.rounds):
            for clients in options.concurrency:
                for server in servers:
                    count = PER_CLIENT * clients
                    drawn, prompts = prompts[:count], prompts[count:]
                    figures = asyncio.run(load(server, drawn, clients, options.tokens, tokenizer))
                    line = {"server": server.name, "round": number, "clients": clients, **figures}
                    print(json.dumps(line), file=sys.stderr)
                    lines.write(json.dumps({**line, **about}) + "\n")
                    lines.flush()


if __name__ == "__main__":
    main()
