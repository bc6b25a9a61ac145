"""Embedder: vectors of texts from a base model alone, for routing."""

import concurrent.futures
import functools
import hashlib
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from transformers import PreTrainedTokenizerBase

from veratune.adapter import base_id
from veratune.errors import ConfigError
from veratune.fingerprint import base_fingerprint
from veratune.serving.engine.threads import run_in_temporary_thread

MAX_TOKENS = 256  # of a text; what comes after them does not count
_CHARACTERS = 16 * MAX_TOKENS  # that are tokenized
_BATCH = 8  # texts


class Embedder:
    """The mean of the last hidden states over a text's first tokens, scaled to length 1.

    It runs beside the engine, on the same weights, one batch of all callers' at a time, in the
    order in which they come.

    Args:
        model: A base model without adapters.
        tokenizer: Its tokenizer.
    """

    def __init__(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self._model = cast(Any, model)
        length = getattr(self._model.config, "max_position_embeddings", None) or MAX_TOKENS
        self.max_tokens = min(MAX_TOKENS, length)
        self.width: int = self._model.config.hidden_size
        self._turns = concurrent.futures.ThreadPoolExecutor(1, "veratune-embedder")

    @functools.cached_property
    def id(self) -> str:
        """The base model's name with a hash of its weights: vectors of other ones differ."""
        found = base_fingerprint(self._model, [])
        values = [] if found is None else found.flatten().tolist()
        words = f"{self._model.config.to_json_string()} {values} {self.max_tokens}"
        return f"{base_id(self._model)}@{hashlib.sha256(words.encode()).hexdigest()[:16]}"

    def tokens(self, text: str) -> list[int]:
        """The token ids of a text that count. Raises ConfigError for a text without any."""
        ids: list[int] = self.tokenizer(text[:_CHARACTERS])["input_ids"][: self.max_tokens]
        if not text.strip() or not ids:
            raise ConfigError("an example or prompt is empty; at least one token is wanted")
        return ids

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Embed texts, a few at a time, so that others' calls run in between.

        Args:
            texts: At least one.

        Returns:
            Shape (texts, width), rows of length 1.

        Raises:
            ConfigError: A text is empty.
        """
        tokens = [self.tokens(text) for text in texts]
        order = sorted(range(len(texts)), key=lambda i: len(tokens[i]))  # little padding
        found = np.empty((len(texts), self.width), np.float32)
        for start in range(0, len(order), _BATCH):
            chosen = order[start : start + _BATCH]
            work = functools.partial(self._forward, [tokens[i] for i in chosen])
            found[chosen] = self._turns.submit(run_in_temporary_thread, work).result()
        return found

    @torch.no_grad()
    def _forward(self, batch: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        device = next(self._model.parameters()).device
        longest = max(map(len, batch))
        ids = torch.zeros(len(batch), longest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, tokens in enumerate(batch):
            ids[row, : len(tokens)] = torch.tensor(tokens)
            mask[row, : len(tokens)] = 1
        output = self._model.base_model(input_ids=ids.to(device), attention_mask=mask.to(device))
        hidden, weights = output.last_hidden_state.float(), mask.to(device)[..., None].float()
        mean = (hidden * weights).sum(1) / weights.sum(1)
        vectors: NDArray[np.float32] = nn.functional.normalize(mean, dim=-1).cpu().numpy()
        return vectors
