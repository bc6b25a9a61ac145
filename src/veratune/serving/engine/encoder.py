"""Encoder: texts of many tenants in one batch, read with a row's own adapter and head: embeddings, classes and scores."""

import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from veratune.errors import ConfigError, UnsupportedError
from veratune.serving.engine.loop import BaseRequest, Loop
from veratune.serving.engine.scheduler import SchedulerConfig
from veratune.serving.pool.pool import AdapterPool

Want = Literal["embedding", "logits"]


@dataclasses.dataclass(eq=False)
class EncodeRequest(BaseRequest):
    """One text, and what is wanted of it. encoded: what the tokenizer made of it. Its one answer is a list of numbers."""

    encoded: Mapping[str, Sequence[int]]
    want: Want = "embedding"

    @property
    def size(self) -> int:
        return len(self.encoded["input_ids"])

    def result(self) -> list[float]:
        """The answer. Raises what went wrong."""
        answer = self.outputs.get()
        if isinstance(answer, BaseException):
            raise answer
        return list(answer)


class Encoder(Loop[EncodeRequest]):
    """Embeddings and logits of one encoder with a pool of adapters.

    An embedding is the mean of the last hidden states over a text's tokens, of length 1: what sentence encoders are trained for
    (Reimers and Gurevych, "Sentence-BERT", 2019).
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        pool: AdapterPool,
        *,
        config: SchedulerConfig | None = None,
        max_model_len: int = 512,
        max_num_batched_tokens: int = 8192,
    ) -> None:
        """length: the most tokens of a text; batch_tokens: of one batch, padding too."""
        super().__init__(model, tokenizer, pool, config)
        self.max_model_len = min(
            max_model_len, getattr(model.config, "max_position_embeddings", None) or max_model_len
        )
        self.max_num_batched_tokens = max_num_batched_tokens
        self._batch: list[EncodeRequest] = []

    def encode(self, text: str, pair: str | None = None) -> Mapping[str, list[int]]:
        """A text, or two, as the model's tokens. Raises ConfigError for one that is too long."""
        encoded: Mapping[str, list[int]] = (
            self.tokenizer(text, pair) if pair is not None else self.tokenizer(text)
        )
        return encoded

    def check(self, request: EncodeRequest) -> None:
        if not request.size:
            raise ConfigError("the text is empty; at least one token is wanted")
        if request.size > self.max_model_len:
            raise ConfigError(
                f"the text has {request.size} tokens; this model takes {self.max_model_len} here: shorten it"
            )
        if request.want == "logits" and request.key is None:
            raise UnsupportedError(
                "the base model has no trained head; name an adapter that was trained to tell classes apart"
            )

    def rows(self) -> list[EncodeRequest]:
        return list(self._batch)

    def step(self) -> bool:
        while (request := self.next()) is not None:
            if request.want == "logits" and not (
                request.lease and request.lease.group and request.lease.group.heads
            ):
                self.fail(
                    request,
                    UnsupportedError(
                        "this adapter has no head: it gives embeddings, and no classes"
                    ),
                )
            else:
                self._batch.append(request)
        if not self._batch:
            return False
        self._batch.sort(key=lambda request: request.size)  # little padding
        first = _kind(self._batch[0])
        rows: list[EncodeRequest] = []
        for request in self._batch:
            if _kind(request) == first and request.size * (len(rows) + 1) <= max(
                self.max_num_batched_tokens, request.size
            ):
                rows.append(request)
        self._read(rows)
        return True

    def fail(self, request: EncodeRequest, error: Exception) -> None:
        if request in self._batch:
            self._batch.remove(request)
        super().fail(request, error)

    def _read(self, rows: list[EncodeRequest]) -> None:
        try:
            answers = self._forward(rows)
        except Exception as error:
            self.fail_batch(rows, error)
            return
        fine, answers = self.drop_nonfinite(rows, answers)
        for request, answer in zip(fine, answers.tolist(), strict=True):
            self._batch.remove(request)
            request.first_token_time = time.perf_counter()
            self.stats.prompt_tokens += request.size
            self.finish(request, "cancelled" if request.cancelled.is_set() else "stop")
            request.on_output(answer)

    @torch.no_grad()
    def _forward(self, rows: Sequence[EncodeRequest]) -> Tensor:
        """(rows, width) or (rows, classes), float32."""
        batch = self.tokenizer.pad(
            [dict(request.encoded) for request in rows], return_tensors="pt"
        ).to(self._device)
        with self.pool.rows([request.lease for request in rows]):
            if rows[0].want == "logits":
                logits: Tensor = self.model(**batch).logits
                return logits.float()
            hidden = self.model.base_model(**batch).last_hidden_state.float()
        mask = batch["attention_mask"][..., None].float()
        return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


def _kind(request: EncodeRequest) -> tuple[Any, ...]:
    """What the rows of one batch have in common."""
    group = request.lease.group if request.lease is not None else None
    return (
        request.want,
        group.head_shapes if request.want == "logits" and group is not None else (),
    )
