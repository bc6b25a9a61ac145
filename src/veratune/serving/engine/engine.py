"""Engine: many conversations of many tenants on one model, a token of each in every step.

schedule (who joins) -> run (a chunk of some prompts, then one token of every row) -> postprocess (draw, stream, leave). The engine's
thread is the only one that runs the model; requests come and go from any thread.
"""

import dataclasses
import itertools
import logging
import time
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from veratune.errors import ConfigError, UnsupportedError
from veratune.serving.engine.kv_cache import SlotCache
from veratune.serving.engine.loop import Ask, Loop
from veratune.serving.engine.prefix_cache import Prefixes
from veratune.serving.engine.sampling import Choice, Sampling, Text, choose
from veratune.serving.engine.scheduler import Limits, together
from veratune.serving.pool.pool import Bank, Key

log = logging.getLogger(__name__)
Finish = Literal["stop", "length", "cancelled"]


@dataclasses.dataclass(frozen=True)
class Piece:
    """A part of an answer: text (may be empty while it is held back), the token it came with, and why the answer ended, in the last one."""

    text: str
    choice: Choice | None = None
    finish: Finish | None = None


@dataclasses.dataclass(eq=False)
class Request(Ask):
    """One prompt, as tokens, and its answer. Iterate over it for the pieces; an error of the request is raised there."""

    prompt: Sequence[int]
    sampling: Sampling

    def __post_init__(self) -> None:
        super().__post_init__()
        self.text: Text | None = None
        self.read = 0  # tokens of the prompt that the cache has
        self.known = 0  # of them, those that it had from an earlier request
        self.last = 0  # the token that the next step begins with
        self.generator: torch.Generator | None = None

    @property
    def size(self) -> int:
        return len(self.prompt) + self.sampling.max_tokens

    @property
    def said(self) -> Sequence[int]:
        """The tokens of the answer so far."""
        return self.text.tokens if self.text is not None else ()

    def __iter__(self) -> Iterator[Piece]:
        while True:
            piece = self.answers.get()
            if isinstance(piece, BaseException):
                raise piece
            yield piece
            if piece.finish is not None:
                return

    def result(self) -> str:
        """The whole answer."""
        return "".join(piece.text for piece in self)


class Engine(Loop[Request]):
    """Generation on one causal model with a bank of adapters.

    length: the most tokens of a prompt and its answer; chunk: tokens of prompts that are read in one step; prefixes: bytes of keys and values
    that are kept of requests that ended, for those of the same tenant and adapter that begin alike, 0 for none.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        bank: Bank,
        *,
        limits: Limits | None = None,
        length: int = 2048,
        chunk: int = 256,
        prefixes: int = 0,
    ) -> None:
        super().__init__(model, tokenizer, bank, limits)
        config = model.config.get_text_config()
        known = getattr(config, "max_position_embeddings", None) or length
        self.length = min(length, known)
        if chunk < 1 or length < 2:
            raise ConfigError(f"length is {length} and chunk {chunk}; at least 2 and 1 are wanted")
        if getattr(model.config, "is_encoder_decoder", False):
            raise UnsupportedError(
                f"{type(model).__name__} has an encoder; the engine generates with causal models"
            )
        self.chunk = chunk
        self._vocabulary = config.vocab_size
        kinds = set(getattr(config, "layer_types", None) or ())
        slides = (
            "sliding_attention" in kinds
            if kinds
            else "sliding_window" in {field.name for field in dataclasses.fields(config)}
        )
        self._near: int | None = config.sliding_window if slides else None
        self._by_layer = bool(kinds)  # masks by the kind of a layer, or one for all
        self.ends = set(_end_tokens(model, tokenizer))
        self._cache = SlotCache(self.limits.rows, self.length)
        self._prefixes = Prefixes(prefixes) if prefixes else None
        self._rows: list[
            Request
        ] = []  # those that answer, and behind them those whose prompts are being read
        self._answering = 0
        self._seeds = itertools.count(time.time_ns())
        self._check_model()

    def check(self, request: Request) -> None:
        if not request.prompt:
            raise ConfigError("the prompt is empty; at least one token is wanted")
        if request.size > self.length:
            raise ConfigError(
                f"{len(request.prompt)} tokens of prompt and {request.sampling.max_tokens} of answer are over the {self.length} that this model "
                "takes here; shorten the prompt or lower max_tokens"
            )
        for what, tokens in (
            ("the prompt", request.prompt),
            ("the bias", [token for token, _ in request.sampling.bias]),
        ):
            if any(not 0 <= token < self._vocabulary for token in tokens):
                raise ConfigError(
                    f"{what} has tokens that this model does not know; its own are 0 to {self._vocabulary - 1}"
                )

    def say_cancelled(self, request: Request) -> None:
        request.listen(Piece("", None, "cancelled"))

    def rows(self) -> list[Request]:
        return list(self._rows)

    def forget(self, key: Key) -> None:
        super().forget(key)
        if self._prefixes is not None:
            self._prefixes.forget(key)

    @property
    def prefix_bytes(self) -> int:
        return self._prefixes.bytes if self._prefixes is not None else 0

    def step(self) -> bool:
        self._leave()
        self._join()
        if not self._rows:
            return False
        if self._answering < len(self._rows):
            self._read()
        if self._answering:
            self._draw(
                *self._forward(0, [[request.last] for request in self._rows[: self._answering]])
            )
        return True

    def _leave(self) -> None:
        for request in [r for r in self._rows if r.cancelled.is_set()]:
            self._end(request, "cancelled", "")

    def _join(self) -> None:
        """Take those who are next into the last rows: as many as one pass reads."""
        while sum(len(r.prompt) - r.read for r in self._rows[self._answering :]) < self.chunk and (
            request := self.next()
        ):
            request.text = Text(self.tokenizer, request.sampling.stop)
            if request.sampling.temperature > 0:
                seed = (
                    request.sampling.seed
                    if request.sampling.seed is not None
                    else next(self._seeds)
                )
                request.generator = torch.Generator(self._device).manual_seed(seed % 2**63)
            self._rows.append(request)
            kept = (
                self._prefixes.find((request.tenant, request.key), request.prompt)
                if self._prefixes
                else None
            )
            if kept is not None:
                request.read = request.known = kept[1]
                self._cache.restore(len(self._rows) - 1, kept[0].layers, request.known)
                self.counts.known_tokens += request.known

    def _read(self) -> None:
        """The next chunk of the prompt that came first, and of those that fit beside it; a prompt's last token gives the first of the answer."""
        first = self._answering
        reading = sorted(self._rows[first:], key=lambda request: request.leased or 0.0)
        sizes = [min(len(request.prompt) - request.read, self.chunk) for request in reading]
        chosen = {reading[i]: sizes[i] for i in together(sizes, self.chunk)}
        for row, request in enumerate(chosen, first):
            self._swap(self._rows.index(request), row)
        fine, logits = self._forward(
            first, [list(r.prompt[r.read : r.read + size]) for r, size in chosen.items()]
        )
        whole = []
        for at, request in enumerate(fine):
            self.counts.prompt_tokens += chosen[request]
            request.read += chosen[request]
            if request.read == len(request.prompt):
                self._swap(self._rows.index(request), self._answering)
                self._answering += 1
                request.first = time.perf_counter()
                whole.append(at)
        self._draw([fine[at] for at in whole], logits[whole])

    def _forward(self, first: int, tokens: list[list[int]]) -> tuple[list[Request], Tensor]:
        """The rows from `first` on that the pass went well for, and the logits of their last tokens; the others have failed."""
        rows = self._rows[first : first + len(tokens)]
        try:
            with self.bank.rows([request.lease for request in rows]):
                logits = self._logits(self._cache, first, tokens)
        except Exception as error:
            self.failed(rows, error)
            return [], torch.empty(0)
        return self.finite(rows, logits)

    @torch.no_grad()
    def _logits(self, cache: SlotCache, first: int, tokens: list[list[int]]) -> Tensor:
        """(rows, vocabulary), of the last of each row's new tokens, which the cache has then."""
        most = max(map(len, tokens))
        padded = torch.tensor(
            [[0] * (most - len(own)) + own for own in tokens], device=self._device
        )
        cache.open(first, [len(own) for own in tokens], self._device)
        try:
            mask: Tensor | dict[str, Tensor] = cache.mask(self.model.dtype)
            if self._near is not None:
                near = cache.mask(self.model.dtype, self._near)
                by_layer = {"full_attention": mask, "sliding_attention": near}
                mask = by_layer if self._by_layer else near  # type: ignore[assignment]
            out = self.model(
                input_ids=padded,
                attention_mask=mask,
                position_ids=cache.positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
        finally:
            cache.close()
        logits: Tensor = out.logits[:, -1]
        return logits

    def _check_model(self) -> None:
        """Raise UnsupportedError for a model that says something else with rows of a cache than without one."""
        size, count = self._vocabulary, min(12, self.length)
        prompt, cache = [3 * i % size for i in range(count)], SlotCache(2, count)
        cuts = (count // 2, max(1, count // 4))  # a pass of unlike lengths, and another
        name = type(self.model).__name__
        try:
            self._logits(cache, 0, [prompt[:cut] for cut in cuts])
            found = self._logits(cache, 0, [prompt[cut:] for cut in cuts]).float()
            with torch.no_grad():
                wanted = (
                    self.model(input_ids=torch.tensor([prompt], device=self._device))
                    .logits[0, -1]
                    .float()
                )
        except Exception as error:
            raise UnsupportedError(
                f"{name} cannot be run with rows of their own lengths: {type(error).__name__}: {error}"
            ) from error
        off = ((found - wanted).norm(dim=-1) / wanted.norm()).max().item()
        if not off < 0.1:  # half precision and quantized products move them by some percent
            raise UnsupportedError(
                f"{name} says something else with rows of their own lengths than without: its logits are off by {off:.0%}"
            )

    def _draw(self, rows: Sequence[Request], logits: Tensor) -> None:
        if not rows:
            return
        chosen = choose(
            logits, [r.sampling for r in rows], [r.generator for r in rows], [r.said for r in rows]
        )
        for request, choice in zip(list(rows), chosen, strict=True):
            self.counts.answer_tokens += 1
            try:
                self._say(request, choice)
            except Exception as error:
                log.exception("a token could not be told")
                self.fail(request, error)

    def _say(self, request: Request, choice: Choice) -> None:
        assert request.text is not None
        if choice.token in self.ends:
            self._end(request, "stop", request.text.end())
            return
        piece = request.text.add(choice.token)
        request.last = choice.token
        if request.text.stopped:
            self._end(request, "stop", piece, choice)
        elif len(request.text.tokens) >= request.sampling.max_tokens:
            self._end(request, "length", piece + request.text.end(), choice)
        else:
            request.listen(Piece(piece, choice))

    def _end(
        self, request: Request, finish: Finish, text: str, choice: Choice | None = None
    ) -> None:
        if self._prefixes is not None:
            row = self._rows.index(request)
            tokens = [*request.prompt, *request.said][: self._cache.held[row]]
            self._prefixes.keep((request.tenant, request.key), tokens, self._cache.save(row))
        self._out(request)
        self.gone(request, finish)
        request.listen(Piece(text, choice, finish))

    def fail(self, request: Request, error: Exception) -> None:
        if request in self._rows:
            self._out(request)
        super().fail(request, error)

    def _out(self, request: Request) -> None:
        """Take a request out of its row; the last one that answers takes its place, and the last one of all that one's."""
        row, last = self._rows.index(request), len(self._rows) - 1
        if row < self._answering:
            self._answering -= 1
            self._swap(row, self._answering)
            row = self._answering
        self._swap(row, last)
        self._cache.free(last)
        self._rows.pop()

    def _swap(self, one: int, other: int) -> None:
        if one != other:
            self._cache.swap(one, other)
            self._rows[one], self._rows[other] = self._rows[other], self._rows[one]


def _end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """The tokens that end an answer: the tokenizer's, and what the model's generation settings say."""
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    listed = own if isinstance(own, list) else [own]
    return [token for token in (*listed, tokenizer.eos_token_id) if token is not None]
