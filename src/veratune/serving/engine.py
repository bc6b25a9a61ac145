"""Engine: many conversations of many tenants on one model, a token of each in every step.

schedule (who joins) -> run (one chunk of a prompt, then one token of every row) -> postprocess (draw, stream, leave). The engine's
thread is the only one that runs the model; requests come and go from any thread.
"""

import collections
import dataclasses
import itertools
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from veratune.adapter import Adapter
from veratune.errors import BankFullError, ConfigError, UnsupportedError, VeratuneError
from veratune.serving.bank import Bank, Key, Lease
from veratune.serving.sampling import Choice, Sampling, Text, choose
from veratune.serving.scheduler import Limits, Scheduler
from veratune.serving.slots import SlotCache

log = logging.getLogger(__name__)
Finish = Literal["stop", "length", "cancelled"]


@dataclasses.dataclass(frozen=True)
class Piece:
    """A part of an answer: text (may be empty while it is held back), the token it came with, and why the answer ended, in the last one."""

    text: str
    choice: Choice | None = None
    finish: Finish | None = None


@dataclasses.dataclass(eq=False)
class Request:
    """One prompt and its answer. Iterate over it for the pieces; an error of the request is raised there.

    tenant: whose turn it takes; key, load: of the adapter, as in `Bank.acquire`; prompt: tokens; times: of arrival, first token and end, in
    seconds of time.perf_counter.
    """

    tenant: str
    prompt: Sequence[int]
    sampling: Sampling
    key: Key | None = None
    load: Callable[[], Adapter] | None = None
    arrived: float = dataclasses.field(default_factory=time.perf_counter)
    first: float | None = None
    ended: float | None = None

    def __post_init__(self) -> None:
        self.cancelled = threading.Event()
        self.pieces: queue.SimpleQueue[Piece | BaseException] = queue.SimpleQueue()
        self.listen: Callable[[Piece | BaseException], None] = self.pieces.put
        self.lease: Lease | None = None
        self.text: Text | None = None
        self.read = 0  # tokens of the prompt that the cache has
        self.last = 0  # the token that the next step begins with
        self.generator: torch.Generator | None = None

    @property
    def size(self) -> int:
        """The most tokens it may take."""
        return len(self.prompt) + self.sampling.max_tokens

    def __iter__(self) -> Iterator[Piece]:
        while True:
            piece = self.pieces.get()
            if isinstance(piece, BaseException):
                raise piece
            yield piece
            if piece.finish is not None:
                return

    def result(self) -> str:
        """The whole answer."""
        return "".join(piece.text for piece in self)


@dataclasses.dataclass
class EngineCounts:
    """What an engine did: steps, tokens of prompts and answers, seconds in steps, requests that ended, by how."""

    steps: int = 0
    prompt_tokens: int = 0
    answer_tokens: int = 0
    seconds: float = 0.0
    ended: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)


class Engine:
    """Generation on one causal model with a bank of adapters. `start` runs it in a thread of its own; `step` is one step of it.

    length: the most tokens of a prompt and its answer; chunk: tokens of a prompt that are read in one step.
    """

    def __init__(
        self, model: Any, tokenizer: Any, bank: Bank, *, limits: Limits | None = None, length: int = 2048, chunk: int = 256
    ) -> None:
        self.model, self.tokenizer, self.bank = model.eval(), tokenizer, bank
        self.limits = limits or Limits()
        config = model.config.get_text_config()
        known = getattr(config, "max_position_embeddings", None) or length
        window = getattr(config, "sliding_window", None) or known  # what leaves a window is not forgotten here: keep all in it
        self.length = min(length, known, window)
        if chunk < 1 or length < 2:
            raise ConfigError(f"length is {length} and chunk {chunk}; at least 2 and 1 are wanted")
        if getattr(model.config, "is_encoder_decoder", False):
            raise UnsupportedError(f"{type(model).__name__} has an encoder; the engine generates with causal models")
        if bank.slots < self.limits.rows:
            raise ConfigError(f"the bank has {bank.slots} slots for {self.limits.rows} rows; every row may want one of its own")
        self.chunk = chunk
        self.scheduler: Scheduler[Request] = Scheduler(self.limits)
        self.counts = EngineCounts()
        self.ends = set(_end_tokens(model, tokenizer))
        self._cache = SlotCache(self.limits.rows, self.length)
        self._rows: list[Request] = []  # those that answer, and behind them at most one whose prompt is being read
        self._reading = False
        self._device = next(model.parameters()).device
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()
        self._drain = False
        self._seeds = itertools.count(time.time_ns())

    def submit(self, request: Request) -> Request:
        """Ask. Returns the request, whose pieces come as they are made.

        Raises ConfigError for a prompt that is empty or does not fit, BusyError where too much waits.
        """
        if not request.prompt:
            raise ConfigError("the prompt is empty; at least one token is wanted")
        if request.size > self.length:
            raise ConfigError(
                f"{len(request.prompt)} tokens of prompt and {request.sampling.max_tokens} of answer are over the {self.length} that this model "
                "takes here; shorten the prompt or lower max_tokens"
            )
        if self._drain:
            raise UnsupportedError("the server is going down and takes no more requests")
        self.scheduler.add(request)
        return request

    def cancel(self, request: Request) -> None:
        """End a request: at once if it waits, at the next step if it runs."""
        request.cancelled.set()
        if self.scheduler.withdraw(request):
            self.counts.ended["cancelled"] += 1
            request.listen(Piece("", None, "cancelled"))

    def start(self) -> None:
        """Run in a thread until `close`."""
        self._thread = threading.Thread(target=self._run, name="veratune-engine", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether the engine's thread runs and takes requests."""
        return self._thread is not None and self._thread.is_alive() and not self._drain

    def close(self, drain: float = 0.0) -> None:
        """Take no more requests, give those there are `drain` seconds to end, and stop."""
        self._drain = True
        end = time.monotonic() + drain
        while time.monotonic() < end and (self.scheduler.waiting or self.scheduler.running):
            time.sleep(0.01)
        self._stop.set()
        self.scheduler.wake()
        if self._thread is not None:
            self._thread.join()
        for request in list(self._rows):
            self._fail(request, UnsupportedError("the server went down before the answer was whole"))

    def step(self) -> bool:
        """One step. Returns whether there was anything to do."""
        begin = time.perf_counter()
        self._leave()
        self._join()
        if not self._rows:
            return False
        if self._reading:
            self._read()
        if len(self._rows) > int(self._reading):
            self._answer()
        self.counts.steps += 1
        self.counts.seconds += time.perf_counter() - begin
        return True

    def _run(self) -> None:
        while not self._stop.is_set():
            if not self.step():
                self.scheduler.wait(0.5)

    def _leave(self) -> None:
        for request in [r for r in self._rows if r.cancelled.is_set()]:
            self._end(request, "cancelled", "")

    def _join(self) -> None:
        """Take the next request into the last row, if no prompt is being read."""
        while not self._reading:
            request = self.scheduler.take()
            if request is None:
                return
            if request.cancelled.is_set():
                self._gone(request, "cancelled")
                request.listen(Piece("", None, "cancelled"))
                continue
            try:
                request.lease = self.bank.acquire(request.key, request.load)
            except Exception as error:
                # A full bank is as much a failure of this one request as a file that cannot be read.
                self._gone(request, "busy" if isinstance(error, BankFullError) else "error")
                request.listen(error)
                continue
            request.text = Text(self.tokenizer, request.sampling.stop)
            if request.sampling.temperature > 0:
                seed = request.sampling.seed if request.sampling.seed is not None else next(self._seeds)
                request.generator = torch.Generator(self._device).manual_seed(seed % 2**63)
            self._rows.append(request)
            self._reading = True

    def _read(self) -> None:
        """The next chunk of the last row's prompt; its last token's logits give the first token of the answer."""
        request, row = self._rows[-1], len(self._rows) - 1
        tokens = request.prompt[request.read : request.read + self.chunk]
        logits = self._forward(row, [list(tokens)])
        if logits is None:
            return
        self.counts.prompt_tokens += len(tokens)
        request.read += len(tokens)
        if request.read == len(request.prompt):
            self._reading = False
            request.first = time.perf_counter()
            self._draw([request], logits)

    def _answer(self) -> None:
        """One token of every row that answers."""
        rows = self._rows[: len(self._rows) - int(self._reading)]
        logits = self._forward(0, [[request.last] for request in rows])
        if logits is not None:
            self._draw(rows, logits)

    @torch.no_grad()
    def _forward(self, first: int, tokens: list[list[int]]) -> Tensor | None:
        """Logits of the last token of each row, or None where the pass failed: then its rows have."""
        rows = self._rows[first : first + len(tokens)]
        try:
            self._cache.open(first, len(tokens), len(tokens[0]), self._device)
            with self.bank.rows([request.lease for request in rows]):
                out = self.model(
                    input_ids=torch.tensor(tokens, device=self._device), attention_mask=self._cache.mask(self.model.dtype),
                    position_ids=self._cache.positions(), past_key_values=self._cache, use_cache=True, logits_to_keep=1,
                )  # fmt: skip
            self._cache.close()
        except Exception as error:
            log.exception("a step of %d rows failed", len(rows))
            for request in list(rows):
                self._fail(request, error if isinstance(error, VeratuneError) else RuntimeError(f"the model failed: {error}"))
            return None
        logits: Tensor = out.logits[:, -1]
        whole = torch.isfinite(logits).all(-1).tolist()
        if not all(whole):
            for request in [r for r, fine in zip(rows, whole, strict=True) if not fine]:
                self._fail(request, UnsupportedError("the adapter makes the model's output infinite or NaN"))
            kept = torch.tensor(whole, device=logits.device)
            logits, rows = logits[kept], [r for r, fine in zip(rows, whole, strict=True) if fine]
            if rows:
                self._draw(rows, logits)
            return None
        return logits

    def _draw(self, rows: Sequence[Request], logits: Tensor) -> None:
        chosen = choose(logits, [r.sampling for r in rows], [r.generator for r in rows])
        for request, choice in zip(list(rows), chosen, strict=True):
            self.counts.answer_tokens += 1
            assert request.text is not None
            if choice.token in self.ends:
                self._end(request, "stop", request.text.end())
                continue
            piece = request.text.add(choice.token)
            request.last = choice.token
            if request.text.stopped:
                self._end(request, "stop", piece, choice)
            elif len(request.text.tokens) >= request.sampling.max_tokens:
                self._end(request, "length", piece + request.text.end(), choice)
            else:
                request.listen(Piece(piece, choice))

    def _end(self, request: Request, finish: Finish, text: str, choice: Choice | None = None) -> None:
        self._out(request)
        self._gone(request, finish)
        request.listen(Piece(text, choice, finish))

    def _fail(self, request: Request, error: Exception) -> None:
        self._out(request)
        self._gone(request, "error")
        request.listen(error)

    def _gone(self, request: Request, how: str) -> None:
        request.ended = time.perf_counter()
        self.counts.ended[how] += 1
        if request.lease is not None:
            request.lease.release()
        self.scheduler.done(request)

    def _out(self, request: Request) -> None:
        """Take a request out of its row; the last row that answers takes its place, and a prompt that is being read stays last."""
        row, last = self._rows.index(request), len(self._rows) - 1
        if self._reading and row == last:
            self._reading = False
        elif self._reading and row < last - 1:
            self._cache.move(last - 1, row)
            self._rows[row] = self._rows[last - 1]
            row = last - 1
        if row != last:
            self._cache.move(last, row)
            self._rows[row] = self._rows[last]
        self._cache.free(last)
        self._rows.pop()


def _end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """The tokens that end an answer: the tokenizer's, and what the model's generation settings say."""
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    listed = own if isinstance(own, list) else [own]
    return [token for token in (*listed, tokenizer.eos_token_id) if token is not None]
