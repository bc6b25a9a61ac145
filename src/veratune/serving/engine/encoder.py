"""Encoder: texts of many tenants in one batch, read with a row's own adapter and head: embeddings, classes and scores."""

import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from veratune.errors import ConfigError, UnsupportedError
from veratune.serving.engine.loop import Ask, Loop
from veratune.serving.engine.scheduler import Limits
from veratune.serving.pool.pool import Bank

Want = Literal["embedding", "logits"]


@dataclasses.dataclass(eq=False)
class Reading(Ask):
    """One text, and what is wanted of it. encoded: what the tokenizer made of it. Its one answer is a list of numbers."""

    encoded: Mapping[str, Sequence[int]]
    want: Want = "embedding"

    @property
    def size(self) -> int:
        return len(self.encoded["input_ids"])

    def result(self) -> list[float]:
        """The answer. Raises what went wrong."""
        answer = self.answers.get()
        if isinstance(answer, BaseException):
            raise answer
        return list(answer)


class Encoder(Loop[Reading]):
    """Embeddings and logits of one encoder with a bank of adapters.

    An embedding is the mean of the last hidden states over a text's tokens, of length 1: what sentence encoders are trained for
    (Reimers and Gurevych, "Sentence-BERT", 2019).
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        bank: Bank,
        *,
        limits: Limits | None = None,
        length: int = 512,
        batch_tokens: int = 8192,
    ) -> None:
        """length: the most tokens of a text; batch_tokens: of one batch, padding too."""
        super().__init__(model, tokenizer, bank, limits)
        self.length = min(length, getattr(model.config, "max_position_embeddings", None) or length)
        self.batch_tokens = batch_tokens
        self._batch: list[Reading] = []

    def encode(self, text: str, pair: str | None = None) -> Mapping[str, list[int]]:
        """A text, or two, as the model's tokens. Raises ConfigError for one that is too long."""
        encoded: Mapping[str, list[int]] = (
            self.tokenizer(text, pair) if pair is not None else self.tokenizer(text)
        )
        return encoded

    def check(self, request: Reading) -> None:
        if not request.size:
            raise ConfigError("the text is empty; at least one token is wanted")
        if request.size > self.length:
            raise ConfigError(
                f"the text has {request.size} tokens; this model takes {self.length} here: shorten it"
            )
        if request.want == "logits" and request.key is None:
            raise UnsupportedError(
                "the base model has no trained head; name an adapter that was trained to tell classes apart"
            )

    def rows(self) -> list[Reading]:
        return list(self._batch)

    def step(self) -> bool:
        while (request := self.next()) is not None:
            if request.want == "logits" and not (
                request.lease and request.lease.plane and request.lease.plane.heads
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
        rows: list[Reading] = []
        for request in self._batch:
            if _kind(request) == first and request.size * (len(rows) + 1) <= max(
                self.batch_tokens, request.size
            ):
                rows.append(request)
        self._read(rows)
        return True

    def fail(self, request: Reading, error: Exception) -> None:
        if request in self._batch:
            self._batch.remove(request)
        super().fail(request, error)

    def _read(self, rows: list[Reading]) -> None:
        try:
            answers = self._forward(rows)
        except Exception as error:
            self.failed(rows, error)
            return
        fine, answers = self.finite(rows, answers)
        for request, answer in zip(fine, answers.tolist(), strict=True):
            self._batch.remove(request)
            request.first = time.perf_counter()
            self.counts.prompt_tokens += request.size
            self.gone(request, "cancelled" if request.cancelled.is_set() else "stop")
            request.listen(answer)

    @torch.no_grad()
    def _forward(self, rows: Sequence[Reading]) -> Tensor:
        """(rows, width) or (rows, classes), float32."""
        batch = self.tokenizer.pad(
            [dict(request.encoded) for request in rows], return_tensors="pt"
        ).to(self._device)
        with self.bank.rows([request.lease for request in rows]):
            if rows[0].want == "logits":
                logits: Tensor = self.model(**batch).logits
                return logits.float()
            hidden = self.model.base_model(**batch).last_hidden_state.float()
        mask = batch["attention_mask"][..., None].float()
        return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


def _kind(request: Reading) -> tuple[Any, ...]:
    """What the rows of one batch have in common."""
    plane = request.lease.plane if request.lease is not None else None
    return (
        request.want,
        plane.head_shapes if request.want == "logits" and plane is not None else (),
    )
