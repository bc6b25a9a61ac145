"""Run a model's Python code against tests in a subprocess with limits.

The subprocess has no environment, an empty folder, limits of time, memory, file size and processes,
and where the kernel allows it no network. That stops mistakes, loops and leaks; it is no wall
against an attacker: run training on code that nobody vouches for in a container.
"""

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile

TIMEOUT = 5.0  # seconds of wall clock and of processor time
MEMORY = 512 * 2**20  # bytes of address space
MAX_CODE = 100_000  # characters of code that are looked at

# Runs in the subprocess: limits first, then the code, then each test on its own. The number of
# passed tests goes out behind a secret, so that code that exits early or prints counts as failed.
_RUNNER = r"""
import ctypes, json, os, resource, sys
job = json.load(sys.stdin)
out = os.dup(1)
null = os.open(os.devnull, os.O_RDWR)
for stream in (0, 1, 2):
    os.dup2(null, stream)
CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000
try:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWNET) and libc.unshare(CLONE_NEWUSER | CLONE_NEWNET):
        pass
except (OSError, AttributeError):
    pass
for limit, value in (
    (resource.RLIMIT_CPU, job["seconds"]),
    (resource.RLIMIT_AS, job["memory"]),
    (resource.RLIMIT_FSIZE, 2**20),
    (resource.RLIMIT_NOFILE, 32),
    (resource.RLIMIT_NPROC, 0),
    (resource.RLIMIT_CORE, 0),
):
    resource.setrlimit(limit, (value, value))
secret, code, tests = job.pop("secret"), job.pop("code"), job.pop("tests")
space, passed = {"__name__": "__main__"}, 0
try:
    exec(compile(code, "completion", "exec"), space)
    for test in tests:
        try:
            exec(compile(test, "test", "exec"), space)
            passed += 1
        except Exception:
            pass
except BaseException:
    os._exit(1)
os.write(out, f"{secret} {passed}".encode())
os._exit(0)
"""


def run_tests(code: str, tests: list[str], *, timeout: float = TIMEOUT) -> float:
    """The share of tests that Python code passes.

    Args:
        code: The code; it runs before the tests, in one namespace with them.
        tests: Statements, each passed if it raises nothing.
        timeout: Seconds for all of it, of wall clock and of processor time.

    Returns:
        A number in [0, 1]; 0 for code that raises, exits, is over MAX_CODE characters or runs out
        of time or memory.
    """
    if not tests or len(code) > MAX_CODE:
        return 0.0
    secret = secrets.token_hex(16)
    job = {
        "code": code,
        "tests": tests,
        "secret": secret,
        "seconds": max(1, round(timeout)),
        "memory": MEMORY,
    }
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _RUNNER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={},
            start_new_session=True,
        )
        try:
            printed, _ = process.communicate(json.dumps(job).encode(), timeout=timeout)
        except subprocess.TimeoutExpired:
            printed = b""
        finally:
            # The session's leader and whatever it started.
            _kill_group(process)
    said, _, passed = printed.decode("utf-8", "replace").partition(" ")
    if said != secret or not passed.isdigit():
        return 0.0
    return min(int(passed), len(tests)) / len(tests)


def _kill_group(process: "subprocess.Popen[bytes]") -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
