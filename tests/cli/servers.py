"""The server as users start it."""

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import httpx2 as httpx

from tests import fakes


@contextlib.contextmanager
def server_of(
    folder: Path, words: Sequence[str], environment: Mapping[str, str] | None = None, **config
) -> Iterator:
    """Run `veratune serve` on a tiny Llama. Gives the process and its URL; afterwards the process
    has `said`, its standard error.
    """
    fakes.folder(fakes.llama(**config), folder / "llama")
    with socket.create_server(("127.0.0.1", 0)) as free:
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    server = subprocess.Popen(
        serve_command(folder, url.rpartition(":")[2], words),
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **(environment or {})},
    )
    try:
        end = time.time() + 90
        while time.time() < end:
            try:
                httpx.get(f"{url}/ready").raise_for_status()
                break
            except httpx.HTTPError:
                assert server.poll() is None, server.stderr.read()
                time.sleep(0.1)
        yield server, url
    finally:
        if server.poll() is None:
            server.kill()
        _, server.said = server.communicate(timeout=60)


def serve_command(folder: Path, port: str, words: Sequence[str]) -> list[str]:
    """The command line of a server of the Llama in a folder."""
    command = [sys.executable, "-m", "veratune.cli.main", "serve", "--model", str(folder / "llama")]
    return [*command, "--port", port, "--store", str(folder / "a.db"), *words]
