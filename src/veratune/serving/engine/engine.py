"""Engine: continuous batching of many tenants' requests on one causal model.

A step reads: admit requests, prefill a chunk of their prompts, decode one token of every sequence.

    Scheduler         whose request runs next, fairly among tenants
    RequestLifecycle  admission, adapters and grammars prepared beside the steps, ends
    RunningBatch      the rows of the KV cache
    ModelRunner       forward passes
    sample            the next tokens
    OutputProcessor   tokens to text, and when a completion ends

Only the engine's thread runs the model; requests come from and go to any thread.
"""

import itertools
import logging
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from veratune.errors import ConfigError
from veratune.serving.engine.detokenizer import Detokenizer
from veratune.serving.engine.grammar import GrammarCompiler
from veratune.serving.engine.lifecycle import EngineStats, RequestLifecycle
from veratune.serving.engine.outputs import OutputProcessor, add_prompt_logprobs, eos_tokens
from veratune.serving.engine.prefix_cache import PrefixCache
from veratune.serving.engine.requests import GenerationRequest, OutputDelta
from veratune.serving.engine.runner import ModelRunner
from veratune.serving.engine.sampler import SamplingState, sample
from veratune.serving.engine.scheduler import Scheduler, SchedulerConfig, select_prefill_batch
from veratune.serving.engine.sequence import RunningBatch, SequenceState
from veratune.serving.engine.threads import EngineThread
from veratune.serving.pool.lease import Key
from veratune.serving.pool.pool import AdapterPool

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)
_TEXT_CONTEXT = 6  # tokens of a prompt that the text of its completion may depend on


class Engine:
    """Text generation on one causal model with a pool of adapters.

    Args:
        model: The causal model.
        tokenizer: Its tokenizer.
        pool: Adapters over the model.
        config: Bounds on running and waiting requests.
        max_model_len: Most tokens of a prompt and its completion.
        max_num_batched_tokens: Prompt tokens that one step prefills.
        prefix_cache_bytes: Bytes of KV cache kept of finished requests; 0: none.

    Raises:
        ConfigError: a bound is too small, or the pool has too few slots.
        UnsupportedError: the model cannot be served.
    """

    def __init__(
        self,
        model: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        pool: AdapterPool,
        *,
        config: SchedulerConfig | None = None,
        max_model_len: int = 2048,
        max_num_batched_tokens: int = 256,
        prefix_cache_bytes: int = 0,
    ) -> None:
        if max_num_batched_tokens < 1 or max_model_len < 2:
            raise ConfigError(
                f"max_model_len is {max_model_len} and max_num_batched_tokens "
                f"{max_num_batched_tokens}; at least 2 and 1 are wanted"
            )
        self.config = config or SchedulerConfig()
        self.lifecycle: RequestLifecycle[GenerationRequest] = RequestLifecycle(
            pool, self.config, self._discard
        )
        self.runner = ModelRunner(model, pool, self.config.max_num_seqs, max_model_len)
        self.batch = RunningBatch(self.runner.cache)
        self.outputs = OutputProcessor(eos_tokens(model, tokenizer))
        self.model, self.tokenizer, self.pool = model, tokenizer, pool
        self.max_model_len = self.runner.max_model_len
        # No text of more characters fits, whatever its tokens are.
        self.max_characters = self.max_model_len * max(map(len, tokenizer.get_vocab()), default=1)
        self.max_num_batched_tokens = max_num_batched_tokens
        self.grammars = GrammarCompiler(
            tokenizer, self.runner.vocab_size, self.outputs.eos_token_ids
        )
        self.prefix_cache = PrefixCache(prefix_cache_bytes) if prefix_cache_bytes else None
        self._paused: dict[GenerationRequest, SequenceState] = {}
        self._seeds = itertools.count(time.time_ns())
        self._thread = EngineThread(
            "veratune-engine", lambda: self.step(), self._fail_all, self.scheduler, self.stats
        )

    @property
    def scheduler(self) -> Scheduler[GenerationRequest]:
        """Waiting and running requests."""
        return self.lifecycle.scheduler

    @property
    def stats(self) -> EngineStats:
        """Counts since the start."""
        return self.lifecycle.stats

    @property
    def eos_token_ids(self) -> set[int]:
        """Tokens that end a completion."""
        return self.outputs.eos_token_ids

    @eos_token_ids.setter
    def eos_token_ids(self, tokens: set[int]) -> None:
        self.outputs.eos_token_ids = tokens

    @property
    def alive(self) -> bool:
        """Whether the thread runs and takes requests."""
        return self._thread.alive and not self.lifecycle.closing

    @property
    def prefix_cache_bytes(self) -> int:
        """Bytes that the prefix cache holds now."""
        return self.prefix_cache.used_bytes if self.prefix_cache is not None else 0

    def check(self, request: GenerationRequest) -> None:
        """Raise ConfigError for a request that cannot run here."""
        if not request.tokens:
            raise ConfigError("the prompt is empty; at least one token is wanted")
        if request.size > self.max_model_len:
            raise ConfigError(
                f"{len(request.tokens)} tokens of prompt and {request.sampling.max_tokens} of "
                f"answer are over the {self.max_model_len} that this model takes here; shorten "
                "the prompt or lower max_tokens"
            )
        size = self.runner.vocab_size
        for what, tokens in (
            ("the prompt", request.tokens),
            ("logit_bias", [token for token, _ in request.sampling.logit_bias]),
            ("stop_token_ids", request.sampling.stop_token_ids),
        ):
            if any(not 0 <= token < size for token in tokens):
                raise ConfigError(
                    f"{what} has tokens that this model does not know; its own are 0 to {size - 1}"
                )

    def submit(self, request: GenerationRequest) -> GenerationRequest:
        """Queue a request and return it; outputs come through `request.on_output`.

        Raises:
            ConfigError: the request is empty or too long.
            QueueFullError: too much is waiting.
            ShutdownError: the engine is closing.
        """
        self.check(request)
        return self.lifecycle.submit(request)

    def cancel(self, request: GenerationRequest) -> None:
        """End a request: at once if it waits, at the next step if it runs."""
        self.lifecycle.cancel(request)

    def start(self) -> None:
        """Run steps in a thread until `close`."""
        self._thread.start()

    def close(self, timeout: float = 0.0) -> None:
        """Take no more requests, give the present ones `timeout` seconds to end, and stop."""
        self.lifecycle.closing = True
        end = time.monotonic() + timeout
        while time.monotonic() < end and (self.scheduler.waiting or self.scheduler.running):
            time.sleep(0.01)
        self._thread.stop()
        self.grammars.checker.close()
        self.lifecycle.close(list(self.batch.requests))

    def forget(self, key: Key) -> None:
        """Remove an adapter that no request uses, and its prefixes."""
        self.pool.drop(key)
        if self.prefix_cache is not None:
            self.prefix_cache.remove_adapter(key)

    def step(self) -> bool:
        """Prefill up to `max_num_batched_tokens` tokens, padding included, and decode one token of
        every sequence; return whether any ran.
        """
        self._end_cancelled()
        self._preempt()
        self._admit()
        if not len(self.batch):
            return False
        left = self.max_num_batched_tokens
        while queue := self._prefill_queue(left):
            left -= self._prefill(queue, left)
        if self.batch.decoding:
            self._decode()
        return True

    def _end_cancelled(self) -> None:
        for request in [r for r in self._paused if r.cancelled.is_set()]:
            self.scheduler.recall(request)
            self._finish(request, OutputDelta("", None, "cancelled"))
        for request in [r for r in self.batch.requests if r.cancelled.is_set()]:
            self._finish(request, OutputDelta("", None, "cancelled"))

    def _preempt(self) -> None:
        """Pause a sequence of a tenant over its fair share if another tenant waits for a slot."""
        started = sorted(self.batch.requests, key=lambda request: request.adapter_ready_time or 0.0)
        request = self.scheduler.victim(started)
        if request is not None:
            self._paused[request] = self.batch.pause(request)
            self.scheduler.preempt(request)
            self.stats.preemptions += 1

    def _admit(self) -> None:
        """Add the next requests, until their prompts fill one prefill pass."""
        while self._tokens_to_prefill() < self.max_num_batched_tokens:
            request = self.lifecycle.next_ready()
            if request is None:
                return
            paused = self._paused.pop(request, None)
            if paused is not None:
                self.batch.add(request, paused)
            else:
                self._start(request)

    def _tokens_to_prefill(self) -> int:
        states = self.batch.states
        return sum(len(r.tokens) - states[r].prefilled for r in self.batch.prefilling)

    def _start(self, request: GenerationRequest) -> None:
        params = request.sampling
        state = SequenceState(
            SamplingState(
                params,
                request.tokens,
                self.runner.vocab_size,
                self.runner.device,
                end_token_ids=sorted(self.outputs.end_tokens(request)),
                seed=params.seed if params.seed is not None else next(self._seeds),
                matcher=request.matcher,
            ),
            Detokenizer(
                self.tokenizer,
                params.stop,
                params.min_tokens,
                request.tokens[-_TEXT_CONTEXT:] if request.continues_text else (),
            ),
        )
        self.batch.add(request, state)
        if self.prefix_cache is None or params.prompt_logprobs is not None:
            return  # logits of cached tokens are not kept
        found = self.prefix_cache.find((request.tenant, request.key), request.tokens)
        if found is not None:
            state.prefilled = request.cached_tokens = found[1]
            self.runner.cache.restore(self.batch.row(request), found[0].layers, found[1])
            self.stats.cached_tokens += found[1]

    def _next_chunk(self, request: GenerationRequest) -> int:
        left = len(request.tokens) - self.batch.states[request].prefilled
        return min(left, self.max_num_batched_tokens)

    def _prefill_queue(self, most: int) -> list[GenerationRequest]:
        """Return the prompts whose next chunk has at most so many tokens, the oldest first."""
        queue = [r for r in self.batch.prefilling if self._next_chunk(r) <= most]
        return sorted(queue, key=lambda request: request.adapter_ready_time or 0.0)

    def _prefill(self, queue: Sequence[GenerationRequest], most: int) -> int:
        """Prefill the next chunk of the first prompt, and of those that fit beside it.

        Args:
            queue: Prompts, the oldest first.
            most: Tokens of the pass, padding included.

        Returns:
            Tokens of the pass.
        """
        batch, states = self.batch, self.batch.states
        sizes = [self._next_chunk(request) for request in queue]
        chosen = select_prefill_batch(sizes, most)
        chunks: dict[GenerationRequest, tuple[int, int]] = {}
        for row, i in enumerate(chosen, batch.decoding):
            batch.swap(batch.row(queue[i]), row)
            start = states[queue[i]].prefilled
            chunks[queue[i]] = start, start + sizes[i]
        tokens = [list(r.tokens[start:end]) for r, (start, end) in chunks.items()]
        requests, logits = self._run(batch.decoding, tokens, chunks)
        complete = []
        for i, request in enumerate(requests):
            start, end = chunks[request]
            self.stats.prompt_tokens += end - start
            states[request].prefilled = end
            if end == len(request.tokens):
                batch.start_decoding(request)
                request.first_token_time = time.perf_counter()
                complete.append(i)
        self._sample([requests[i] for i in complete], logits[complete])
        return max(map(len, tokens)) * len(tokens)

    def _decode(self) -> None:
        requests = self.batch.requests[: self.batch.decoding]
        tokens = [[self.batch.states[request].last_token] for request in requests]
        self._sample(*self._run(0, tokens, {}))

    def _run(
        self,
        first_row: int,
        tokens: list[list[int]],
        chunks: dict[GenerationRequest, tuple[int, int]],
    ) -> tuple[list[GenerationRequest], Tensor]:
        """Run a forward pass; return the requests that it went well for and their last logits."""
        requests = self.batch.requests[first_row : first_row + len(tokens)]
        scored = [r for r in requests if r in chunks and r.sampling.prompt_logprobs is not None]
        try:
            leases = [request.lease for request in requests]
            logits = self.runner.run(first_row, tokens, leases, all_positions=bool(scored))
            for request in scored:
                add_prompt_logprobs(request, chunks[request], logits[requests.index(request)])
        except Exception as error:
            self.lifecycle.fail_batch(requests, error)
            return [], Tensor()
        return self.lifecycle.drop_nonfinite(requests, logits[:, -1])

    def _sample(self, requests: Sequence[GenerationRequest], logits: Tensor) -> None:
        """Sample a token for each request and send it."""
        if not requests:
            return
        states = [self.batch.states[request] for request in requests]
        tokens = sample(logits, [state.sampling for state in states])
        for request, state, token in zip(requests, states, tokens, strict=True):
            try:
                if request.sampling.max_tokens == 0:
                    delta = OutputDelta("", None, "length")
                else:
                    self.stats.generation_tokens += 1
                    delta = self.outputs.process(request, state, token)
                if delta.finish_reason is None:
                    request.on_output(delta)
                else:
                    self._finish(request, delta)
            except Exception as error:
                log.exception("an output could not be processed")
                if request in self.batch:
                    self.lifecycle.fail(request, error)

    def _finish(self, request: GenerationRequest, delta: OutputDelta) -> None:
        """End a request with its last delta; its KV cache goes to the prefix cache."""
        if self.prefix_cache is not None and request in self.batch:
            row = self.batch.row(request)
            length = self.runner.cache.lengths[row]
            tokens = [*request.tokens, *request.output_token_ids][:length]
            self.prefix_cache.add(
                (request.tenant, request.key), tokens, self.runner.cache.save(row)
            )
        self.lifecycle.end(request, delta.finish_reason or "stop")
        request.on_output(delta)

    def _discard(self, request: GenerationRequest) -> None:
        self._paused.pop(request, None)
        if request in self.batch:
            self.batch.remove(request)

    def _fail_all(self, error: Exception) -> None:
        for request in list(self.batch.requests):
            self.lifecycle.fail(request, error)
