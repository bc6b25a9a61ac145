"""GrammarChecker: whether a grammar compiles within bounds of time and memory.

Some small schemas take llguidance for ever (an allOf of many anyOf doubles with each), and a thread
cannot be stopped. So a grammar is first compiled in a process that can be.
"""

import contextlib
import json
import selectors
import subprocess
import sys
import threading
import weakref
from pathlib import Path

from veratune.errors import UnsupportedError

_WORKER = Path(__file__).with_name("grammar_worker.py")
_WAIT = 10.0  # seconds for the process, which may be short of CPU


class GrammarChecker:
    """Compiles grammars in a process of its own. Safe to use from any thread, one at a time.

    Args:
        limits: Arguments of llguidance's LLParserLimits.
        seconds: CPU seconds of one grammar.
    """

    def __init__(self, limits: dict[str, int | bool], seconds: float = 2.0) -> None:
        self.limits, self.seconds = limits, seconds
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    def check(self, grammar: str) -> None:
        """Compile a grammar and forget it.

        Args:
            grammar: In llguidance's form.

        Raises:
            UnsupportedError: The grammar is wrong, or takes too long or too much memory.
        """
        task = {"grammar": grammar, "limits": self.limits, "seconds": self.seconds}
        with self._lock:
            line = self._run(json.dumps(task).encode() + b"\n")
        if not line:
            raise UnsupportedError(
                f"the grammar takes over {self.seconds:g} s or too much memory to compile; "
                "a simpler one is wanted"
            )
        message = " ".join(json.loads(line).get("error", "").split())[:300]
        if message:
            raise UnsupportedError(f"the grammar cannot be used: {message}")

    def close(self) -> None:
        """End the process."""
        with self._lock:
            self._end()

    def _run(self, task: bytes) -> bytes:
        """The process's line for a task; b"" if it died or did not answer, and has ended."""
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-I", str(_WORKER)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
            self._stop = weakref.finalize(self, _kill, self._process)
        process = self._process
        line = b""
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(task)  # type: ignore[union-attr]  # both are pipes
            process.stdin.flush()  # type: ignore[union-attr]
            with selectors.DefaultSelector() as selector:
                selector.register(process.stdout, selectors.EVENT_READ)  # type: ignore[arg-type]
                if selector.select(_WAIT):
                    line = process.stdout.readline()  # type: ignore[union-attr]
        if not line:
            self._end()
        return line

    def _end(self) -> None:
        if self._process is not None:
            self._stop()
            self._process = None


def _kill(process: "subprocess.Popen[bytes]") -> None:
    """End a process and close its pipes."""
    process.kill()
    with contextlib.suppress(BrokenPipeError):
        process.communicate()
