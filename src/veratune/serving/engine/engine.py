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
from veratune.serving.engine.kv_cache import KVCache
from veratune.serving.engine.loop import BaseRequest, Loop
from veratune.serving.engine.prefix_cache import PrefixCache
from veratune.serving.engine.sampling import Detokenizer, SampledToken, SamplingParams, sample
from veratune.serving.engine.scheduler import SchedulerConfig, select_prefill_batch
from veratune.serving.pool.pool import AdapterPool, Key

log = logging.getLogger(__name__)
FinishReason = Literal["stop", "length", "cancelled"]


@dataclasses.dataclass(frozen=True)
class OutputDelta:
    """A part of an answer: text (may be empty while it is held back), the token it came with, and why the answer ended, in the last one."""

    text: str
    token: SampledToken | None = None
    finish_reason: FinishReason | None = None


@dataclasses.dataclass(eq=False)
class GenerationRequest(BaseRequest):
    """One prompt, as tokens, and its answer. Iterate over it for the pieces; an error of the request is raised there."""

    tokens: Sequence[int]
    sampling: SamplingParams

    def __post_init__(self) -> None:
        super().__post_init__()
        self.text: Detokenizer | None = None
        self.read = 0  # tokens of the prompt that the cache has
        self.cached_tokens = 0  # of them, those that it had from an earlier request
        self.last = 0  # the token that the next step begins with
        self.generator: torch.Generator | None = None

    @property
    def size(self) -> int:
        return len(self.tokens) + self.sampling.max_tokens

    @property
    def output_token_ids(self) -> Sequence[int]:
        """The tokens of the answer so far."""
        return self.text.tokens if self.text is not None else ()

    def __iter__(self) -> Iterator[OutputDelta]:
        while True:
            piece = self.outputs.get()
            if isinstance(piece, BaseException):
                raise piece
            yield piece
            if piece.finish_reason is not None:
                return

    def result(self) -> str:
        """The whole answer."""
        return "".join(piece.text for piece in self)


class Engine(Loop[GenerationRequest]):
    """Generation on one causal model with a pool of adapters.

    length: the most tokens of a prompt and its answer; chunk: tokens of prompts that are read in one step; prefixes: bytes of keys and values
    that are kept of requests that ended, for those of the same tenant and adapter that begin alike, 0 for none.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        pool: AdapterPool,
        *,
        config: SchedulerConfig | None = None,
        max_model_len: int = 2048,
        max_num_batched_tokens: int = 256,
        prefix_cache_bytes: int = 0,
    ) -> None:
        super().__init__(model, tokenizer, pool, config)
        text_config = model.config.get_text_config()
        known = getattr(text_config, "max_position_embeddings", None) or max_model_len
        self.max_model_len = min(max_model_len, known)
        if max_num_batched_tokens < 1 or max_model_len < 2:
            raise ConfigError(
                f"max_model_len is {max_model_len} and max_num_batched_tokens {max_num_batched_tokens}; "
                "at least 2 and 1 are wanted"
            )
        if getattr(model.config, "is_encoder_decoder", False):
            raise UnsupportedError(
                f"{type(model).__name__} has an encoder; the engine generates with causal models"
            )
        self.max_num_batched_tokens = max_num_batched_tokens
        self._vocabulary = text_config.vocab_size
        kinds = set(getattr(text_config, "layer_types", None) or ())
        slides = (
            "sliding_attention" in kinds
            if kinds
            else "sliding_window" in {field.name for field in dataclasses.fields(text_config)}
        )
        self._near: int | None = text_config.sliding_window if slides else None
        self._by_layer = bool(kinds)  # masks by the kind of a layer, or one for all
        self.eos_token_ids = set(_end_tokens(model, tokenizer))
        self._cache = KVCache(self.config.max_num_seqs, self.max_model_len)
        self._prefixes = PrefixCache(prefix_cache_bytes) if prefix_cache_bytes else None
        self._rows: list[
            GenerationRequest
        ] = []  # those that answer, and behind them those whose prompts are being read
        self._answering = 0
        self._seeds = itertools.count(time.time_ns())
        self._check_model()

    def check(self, request: GenerationRequest) -> None:
        if not request.tokens:
            raise ConfigError("the prompt is empty; at least one token is wanted")
        if request.size > self.max_model_len:
            raise ConfigError(
                f"{len(request.tokens)} tokens of prompt and {request.sampling.max_tokens} of answer are over the {self.max_model_len} that this model "
                "takes here; shorten the prompt or lower max_tokens"
            )
        for what, tokens in (
            ("the prompt", request.tokens),
            ("the bias", [token for token, _ in request.sampling.logit_bias]),
        ):
            if any(not 0 <= token < self._vocabulary for token in tokens):
                raise ConfigError(
                    f"{what} has tokens that this model does not know; its own are 0 to {self._vocabulary - 1}"
                )

    def report_cancelled(self, request: GenerationRequest) -> None:
        request.on_output(OutputDelta("", None, "cancelled"))

    def rows(self) -> list[GenerationRequest]:
        return list(self._rows)

    def forget(self, key: Key) -> None:
        super().forget(key)
        if self._prefixes is not None:
            self._prefixes.forget(key)

    @property
    def prefix_cache_bytes(self) -> int:
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
        while sum(
            len(r.tokens) - r.read for r in self._rows[self._answering :]
        ) < self.max_num_batched_tokens and (request := self.next()):
            request.text = Detokenizer(self.tokenizer, request.sampling.stop)
            if request.sampling.temperature > 0:
                seed = (
                    request.sampling.seed
                    if request.sampling.seed is not None
                    else next(self._seeds)
                )
                request.generator = torch.Generator(self._device).manual_seed(seed % 2**63)
            self._rows.append(request)
            kept = (
                self._prefixes.find((request.tenant, request.key), request.tokens)
                if self._prefixes
                else None
            )
            if kept is not None:
                request.read = request.cached_tokens = kept[1]
                self._cache.restore(len(self._rows) - 1, kept[0].layers, request.cached_tokens)
                self.stats.cached_tokens += request.cached_tokens

    def _read(self) -> None:
        """The next chunk of the prompt that came first, and of those that fit beside it; a prompt's last token gives the first of the answer."""
        first = self._answering
        reading = sorted(self._rows[first:], key=lambda request: request.adapter_ready_time or 0.0)
        sizes = [
            min(len(request.tokens) - request.read, self.max_num_batched_tokens)
            for request in reading
        ]
        chosen = {
            reading[i]: sizes[i] for i in select_prefill_batch(sizes, self.max_num_batched_tokens)
        }
        for row, request in enumerate(chosen, first):
            self._swap(self._rows.index(request), row)
        fine, logits = self._forward(
            first, [list(r.tokens[r.read : r.read + size]) for r, size in chosen.items()]
        )
        whole = []
        for at, request in enumerate(fine):
            self.stats.prompt_tokens += chosen[request]
            request.read += chosen[request]
            if request.read == len(request.tokens):
                self._swap(self._rows.index(request), self._answering)
                self._answering += 1
                request.first_token_time = time.perf_counter()
                whole.append(at)
        self._draw([fine[at] for at in whole], logits[whole])

    def _forward(
        self, first: int, tokens: list[list[int]]
    ) -> tuple[list[GenerationRequest], Tensor]:
        """The rows from `first` on that the pass went well for, and the logits of their last tokens; the others have failed."""
        rows = self._rows[first : first + len(tokens)]
        try:
            with self.pool.rows([request.lease for request in rows]):
                logits = self._logits(self._cache, first, tokens)
        except Exception as error:
            self.fail_batch(rows, error)
            return [], torch.empty(0)
        return self.drop_nonfinite(rows, logits)

    @torch.no_grad()
    def _logits(self, cache: KVCache, first: int, tokens: list[list[int]]) -> Tensor:
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
        size, count = self._vocabulary, min(12, self.max_model_len)
        prompt, cache = [3 * i % size for i in range(count)], KVCache(2, count)
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

    def _draw(self, rows: Sequence[GenerationRequest], logits: Tensor) -> None:
        if not rows:
            return
        chosen = sample(
            logits,
            [r.sampling for r in rows],
            [r.generator for r in rows],
            [r.output_token_ids for r in rows],
        )
        for request, choice in zip(list(rows), chosen, strict=True):
            self.stats.generation_tokens += 1
            try:
                self._say(request, choice)
            except Exception as error:
                log.exception("a token could not be told")
                self.fail(request, error)

    def _say(self, request: GenerationRequest, choice: SampledToken) -> None:
        assert request.text is not None
        if choice.token_id in self.eos_token_ids:
            self._end(request, "stop", request.text.end())
            return
        piece = request.text.add(choice.token_id)
        request.last = choice.token_id
        if request.text.stopped:
            self._end(request, "stop", piece, choice)
        elif len(request.text.tokens) >= request.sampling.max_tokens:
            self._end(request, "length", piece + request.text.end(), choice)
        else:
            request.on_output(OutputDelta(piece, choice))

    def _end(
        self,
        request: GenerationRequest,
        finish: FinishReason,
        text: str,
        choice: SampledToken | None = None,
    ) -> None:
        if self._prefixes is not None:
            row = self._rows.index(request)
            tokens = [*request.tokens, *request.output_token_ids][: self._cache.held[row]]
            self._prefixes.keep((request.tenant, request.key), tokens, self._cache.save(row))
        self._out(request)
        self.finish(request, finish)
        request.on_output(OutputDelta(text, choice, finish))

    def fail(self, request: GenerationRequest, error: Exception) -> None:
        if request in self._rows:
            self._out(request)
        super().fail(request, error)

    def _out(self, request: GenerationRequest) -> None:
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
