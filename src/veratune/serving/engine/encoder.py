"""Encoder: embeddings and class logits of many tenants' texts, each with its own adapter and
head.
"""

import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from veratune.errors import ConfigError, UnsupportedError
from veratune.serving.engine.lifecycle import EngineStats, RequestLifecycle
from veratune.serving.engine.requests import BaseRequest
from veratune.serving.engine.scheduler import Scheduler, SchedulerConfig
from veratune.serving.engine.threads import EngineThread
from veratune.serving.pool.lease import Key
from veratune.serving.pool.pool import AdapterPool

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Want = Literal["embedding", "logits"]


@dataclasses.dataclass(eq=False)
class EncodeRequest(BaseRequest[list[float]]):
    """A text to encode; its one output is a list of numbers.

    Args:
        encoded: The tokenizer's output for the text.
        want: Whether an embedding or the head's logits are returned.
    """

    encoded: Mapping[str, Sequence[int]]
    want: Want = "embedding"

    @property
    def size(self) -> int:
        return len(self.encoded["input_ids"])

    def result(self) -> list[float]:
        """Return the numbers; raises the request's error."""
        output = self.outputs.get()
        if isinstance(output, BaseException):
            raise output
        return list(output)


class Encoder:
    """Embeddings and logits of one encoder model with a pool of adapters.

    An embedding is the mean of the last hidden states over a text's tokens, scaled to length 1, as
    sentence encoders are trained (Reimers and Gurevych, "Sentence-BERT", 2019).

    Args:
        model: The encoder.
        tokenizer: Its tokenizer.
        pool: Adapters over the model.
        config: Bounds on running and waiting requests.
        max_model_len: Most tokens of a text.
        max_num_batched_tokens: Most tokens of a batch, padding included.

    Raises:
        ConfigError: the pool has too few slots.
    """

    def __init__(
        self,
        model: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        pool: AdapterPool,
        *,
        config: SchedulerConfig | None = None,
        max_model_len: int = 512,
        max_num_batched_tokens: int = 8192,
    ) -> None:
        self.config = config or SchedulerConfig()
        self.lifecycle: RequestLifecycle[EncodeRequest] = RequestLifecycle(
            pool, self.config, self._discard
        )
        self.model, self.tokenizer, self.pool = model.eval(), tokenizer, pool
        own_length = getattr(model.config, "max_position_embeddings", None) or max_model_len
        self.max_model_len: int = min(max_model_len, own_length)
        self.max_num_batched_tokens = max_num_batched_tokens
        self.prefix_cache_bytes = 0
        self._batch: list[EncodeRequest] = []
        self._device = next(model.parameters()).device
        self._thread = EngineThread(
            "veratune-encoder", lambda: self.step(), self._fail_all, self.scheduler, self.stats
        )

    @property
    def scheduler(self) -> Scheduler[EncodeRequest]:
        """Waiting and running requests."""
        return self.lifecycle.scheduler

    @property
    def stats(self) -> EngineStats:
        """Counts since the start."""
        return self.lifecycle.stats

    @property
    def alive(self) -> bool:
        """Whether the thread runs and takes requests."""
        return self._thread.alive and not self.lifecycle.closing

    def encode(self, text: str, pair: str | None = None) -> Mapping[str, list[int]]:
        """Return the tokens of a text, or of two."""
        encoded: Mapping[str, list[int]] = (
            self.tokenizer(text, pair) if pair is not None else self.tokenizer(text)
        )
        return encoded

    def check(self, request: EncodeRequest) -> None:
        """Raise ConfigError or UnsupportedError for a request that cannot run here."""
        if not request.size:
            raise ConfigError("the text is empty; at least one token is wanted")
        if request.size > self.max_model_len:
            raise ConfigError(
                f"the text has {request.size} tokens; this model takes {self.max_model_len} here: "
                "shorten it"
            )
        if request.want == "logits" and request.key is None:
            raise UnsupportedError(
                "the base model has no trained head; name an adapter that was trained to classify"
            )

    def submit(self, request: EncodeRequest) -> EncodeRequest:
        """Queue a request and return it; the output comes through `request.on_output`.

        Raises:
            ConfigError: the text is empty or too long.
            UnsupportedError: logits of the base model.
            QueueFullError: too much is waiting.
            ShutdownError: the engine is closing.
        """
        self.check(request)
        return self.lifecycle.submit(request)

    def cancel(self, request: EncodeRequest) -> None:
        """End a request that waits."""
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
        self.lifecycle.close(list(self._batch))

    def forget(self, key: Key) -> None:
        """Remove an adapter that no request uses."""
        self.pool.drop(key)

    def step(self) -> bool:
        """Encode one batch; return whether there was one."""
        self._admit()
        if not self._batch:
            return False
        requests = self._select_batch()
        try:
            output = self._forward(requests)
        except Exception as error:
            self.lifecycle.fail_batch(requests, error)
            return True
        finite, output = self.lifecycle.drop_nonfinite(requests, output)
        for request, numbers in zip(finite, output.tolist(), strict=True):
            request.first_token_time = time.perf_counter()
            self.stats.prompt_tokens += request.size
            self.lifecycle.end(request, "cancelled" if request.cancelled.is_set() else "stop")
            request.on_output(numbers)
        return True

    def _admit(self) -> None:
        while (request := self.lifecycle.next_ready()) is not None:
            group = request.lease.group if request.lease is not None else None
            if request.want == "logits" and (group is None or not group.heads):
                self.lifecycle.fail(
                    request,
                    UnsupportedError(
                        "this adapter has no head: it gives embeddings, and no classes"
                    ),
                )
            else:
                self._batch.append(request)

    def _select_batch(self) -> list[EncodeRequest]:
        """Return the shortest requests that fit one batch, with heads of one shape."""
        self._batch.sort(key=lambda request: request.size)  # little padding
        kind = _batch_kind(self._batch[0])
        chosen: list[EncodeRequest] = []
        for request in self._batch:
            tokens = request.size * (len(chosen) + 1)
            fits = tokens <= max(self.max_num_batched_tokens, request.size)
            if fits and _batch_kind(request) == kind:
                chosen.append(request)
        return chosen

    @torch.no_grad()
    def _forward(self, requests: Sequence[EncodeRequest]) -> Tensor:
        """Return logits (rows, classes) or embeddings (rows, width), in float32."""
        encoded = [{k: list(v) for k, v in request.encoded.items()} for request in requests]
        batch = self.tokenizer.pad(encoded, return_tensors="pt").to(self._device)
        with self.pool.rows([request.lease for request in requests]):
            if requests[0].want == "logits":
                logits: Tensor = self.model(**batch).logits
                return logits.float()
            hidden = self.model.base_model(**batch).last_hidden_state.float()
        mask = batch["attention_mask"][..., None].float()
        return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)

    def _discard(self, request: EncodeRequest) -> None:
        if request in self._batch:
            self._batch.remove(request)

    def _fail_all(self, error: Exception) -> None:
        for request in list(self._batch):
            self.lifecycle.fail(request, error)


def _batch_kind(request: EncodeRequest) -> tuple[Want, tuple[tuple[int, ...], ...]]:
    """Return what the requests of one batch have in common: the output and its head's shapes."""
    group = request.lease.group if request.lease is not None else None
    heads = request.want == "logits" and group is not None
    return request.want, group.head_shapes if heads and group is not None else ()
