"""ModelRunner: runs forward passes over rows of a KV cache, each row with its own adapter."""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from veratune.errors import UnsupportedError
from veratune.layers.few_rows import replace_linears
from veratune.serving.engine.kv_cache import KVCache
from veratune.serving.pool.lease import Lease
from veratune.serving.pool.pool import AdapterPool

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PROBE_TOKENS = 12


class ModelRunner:
    """A causal model, its adapters and its KV cache.

    On a CPU the model's float32 linear layers become `FewRowsLinear`, which decode faster.

    Args:
        model: A causal model of transformers.
        pool: Adapters over that model.
        max_num_seqs: Rows of the KV cache.
        max_model_len: Most tokens of a row; the model's own bound counts too.

    Raises:
        UnsupportedError: the model is no causal model, or computes something else with this KV
            cache than without one.
    """

    def __init__(
        self, model: "PreTrainedModel", pool: AdapterPool, max_num_seqs: int, max_model_len: int
    ) -> None:
        name = type(model).__name__
        if getattr(model.config, "is_encoder_decoder", False):
            raise UnsupportedError(
                f"{name} has an encoder; the engine generates with causal models"
            )
        self.model, self.pool = model.eval(), pool
        self.device = next(model.parameters()).device
        config = model.config.get_text_config()
        own_length = getattr(config, "max_position_embeddings", None) or max_model_len
        self.max_model_len: int = min(max_model_len, own_length)
        self.vocab_size: int = config.vocab_size
        kinds = set(getattr(config, "layer_types", None) or ())
        fields = {field.name for field in dataclasses.fields(config)}
        slides = "sliding_attention" in kinds if kinds else "sliding_window" in fields
        self._window: int | None = config.sliding_window if slides else None
        self._masks_by_layer_type = bool(kinds)
        replace_linears(model)
        self.cache = KVCache(max_num_seqs, self.max_model_len)
        self._check_model()

    def run(
        self,
        first_row: int,
        tokens: Sequence[Sequence[int]],
        leases: Sequence[Lease | None],
        all_positions: bool = False,
    ) -> Tensor:
        """Run one forward pass and append its tokens to the KV cache.

        Args:
            first_row: First row of the cache; the following ones are contiguous.
            tokens: New tokens of each row.
            leases: Adapter of each row.
            all_positions: Whether to return the logits of all positions.

        Returns:
            Logits (rows, 1, vocab) of the last position of each row; (rows, longest, vocab) for
            all positions, where shorter rows are padded on the left.
        """
        with self.pool.rows(leases):
            return self._forward(self.cache, first_row, tokens, all_positions)

    @torch.no_grad()
    def _forward(
        self,
        cache: KVCache,
        first_row: int,
        tokens: Sequence[Sequence[int]],
        all_positions: bool = False,
    ) -> Tensor:
        longest = max(map(len, tokens))
        padded = torch.tensor(
            [[0] * (longest - len(row)) + list(row) for row in tokens], device=self.device
        )
        cache.open(first_row, [len(row) for row in tokens], self.device)
        try:
            output = self.model(
                input_ids=padded,
                attention_mask=self._mask(cache),
                position_ids=cache.positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=longest if all_positions else 1,
            )
        finally:
            cache.close()
        logits: Tensor = output.logits
        return logits

    def _mask(self, cache: KVCache) -> Tensor | dict[str, Tensor]:
        """Return the attention mask, or one for each type of layers where the model has several."""
        full = cache.mask(self.model.dtype)
        if self._window is None:
            return full
        sliding = cache.mask(self.model.dtype, self._window)
        if not self._masks_by_layer_type:
            return sliding
        return {"full_attention": full, "sliding_attention": sliding}

    def _check_model(self) -> None:
        """Compare a ragged batch in the KV cache with a plain forward pass."""
        count = min(_PROBE_TOKENS, self.max_model_len)
        prompt = [3 * i % self.vocab_size for i in range(count)]
        cache = KVCache(2, count)
        cuts = (count // 2, max(1, count // 4))  # two passes, of rows of different lengths
        name = type(self.model).__name__
        try:
            self._forward(cache, 0, [prompt[:cut] for cut in cuts])
            found = self._forward(cache, 0, [prompt[cut:] for cut in cuts])[:, -1].float()
            with torch.no_grad():
                ids = torch.tensor([prompt], device=self.device)
                wanted = self.model(input_ids=ids).logits[0, -1].float()
        except Exception as error:
            raise UnsupportedError(
                f"{name} cannot run a ragged batch: {type(error).__name__}: {error}"
            ) from error
        off = ((found - wanted).norm(dim=-1) / wanted.norm()).max().item()
        if not off < 0.1:  # half precision and quantized products move them by some percent
            raise UnsupportedError(
                f"logits of {name} in a ragged batch differ from the plain ones by {off:.0%}; "
                "the engine cannot serve this model"
            )
