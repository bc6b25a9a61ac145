"""KVCache: keys and values of running sequences, one row each, every row of its own length.

Running sequences stand in contiguous rows from 0 on, so a batch is a view of the memory, not a
copy.
"""

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from veratune.errors import UnsupportedError


@dataclasses.dataclass
class Window:
    """The rows and positions of one forward pass.

    Args:
        first: First row.
        new: New tokens of each row; they stand at the right end of the input.
        positions: Positions of the input's tokens, (rows, queries); 0 for padding.
        longest: Tokens of the longest row, new ones included.
        real: Places of tokens that are no padding in the flattened input; None: all.
        index: Where the new tokens go in the memory.
    """

    first: int
    new: list[int]
    positions: Tensor
    longest: int
    real: Tensor | None
    index: tuple[Tensor, slice, Tensor]


class KVCache(Cache):
    """A cache for transformers' causal models in which every row has its own length.

    Memory grows with the rows and the longest row in use: rows x tokens x 2 x width a layer.

    Args:
        rows: Most rows at once.
        length: Most tokens of a row.

    Attributes:
        lengths: Tokens that each row holds.
    """

    def __init__(self, rows: int, length: int) -> None:
        super().__init__(layers=[])
        self.rows, self.length = rows, length
        self.lengths = [0] * rows
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []
        self._window: Window | None = None

    def open(self, first: int, new: Sequence[int], device: torch.device) -> Window:
        """Prepare a forward pass.

        Args:
            first: First row of the pass.
            new: New tokens of each row from there on; the input is as wide as the most of them,
                and shorter rows are padded on the left.
            device: Where the input is.
        """
        most = max(new)
        ends = [length + count for length, count in zip(self.lengths[first:], new, strict=False)]
        positions = (
            torch.tensor(ends, device=device)[:, None] - most + torch.arange(most, device=device)
        )
        row, place = (
            torch.arange(len(new), device=device).repeat_interleave(most),
            positions.flatten(),
        )
        real = None
        if min(new) < most:
            padding = most - torch.tensor(new, device=device)
            real = (torch.arange(most, device=device) >= padding[:, None]).flatten().nonzero()[:, 0]
            row, place = row[real], place[real]
        self._window = Window(
            first, list(new), positions.clamp(min=0), max(ends), real, (row, slice(None), place)
        )
        return self._window

    def mask(self, dtype: torch.dtype, window_size: int | None = None) -> Tensor:
        """Return the additive causal mask of the pass, (rows, 1, queries, longest).

        Args:
            dtype: Its dtype; hidden positions get the least number of it.
            window_size: Last tokens that a sliding window sees, the token itself among them.
        """
        window = self._opened()
        keys = torch.arange(window.longest, device=window.positions.device)
        queries = window.positions[:, :, None]
        hidden = keys > queries
        if window_size is not None:
            hidden = hidden | (keys <= queries - window_size)
        return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill(
            hidden, torch.finfo(dtype).min
        )[:, None]

    @property
    def positions(self) -> Tensor:
        """Positions of the pass's tokens, (rows, queries)."""
        return self._opened().positions

    def close(self) -> None:
        """End the pass; its rows hold the new tokens, or what was written until it failed."""
        window = self._opened()
        for row, count in enumerate(window.new, window.first):
            self.lengths[row] += count
        self._window = None

    def update(
        self,
        key_states: Tensor,
        value_states: Tensor,
        layer_idx: int,
        *args: object,
        **kwargs: object,
    ) -> tuple[Tensor, Tensor]:
        """Write new keys and values, (rows, heads, queries, width); return all of the pass's
        rows.
        """
        window = self._opened()
        while len(self._keys) <= layer_idx:
            self._keys.append(key_states.new_empty(0, 0, 0, 0))
            self._values.append(value_states.new_empty(0, 0, 0, 0))
        end = window.first + len(window.new)
        out = []
        for layers, new in ((self._keys, key_states), (self._values, value_states)):
            memory = self._large_enough(layers[layer_idx], new, end, window.longest)
            layers[layer_idx] = memory
            rows = memory[window.first : end]
            tokens = new.transpose(1, 2).flatten(0, 1)
            # Advanced indices around a slice put their dimension, the tokens, in front.
            rows[window.index] = tokens if window.real is None else tokens[window.real]
            out.append(rows[:, :, : window.longest])
        return out[0], out[1]

    def swap(self, first: int, second: int) -> None:
        """Exchange two rows."""
        lengths, rows = self.lengths, max(first, second) + 1
        length = max(lengths[first], lengths[second])
        for layers in (self._keys, self._values) if length else ():
            for layer, old in enumerate(layers):
                if old.numel():
                    memory = layers[layer] = self._large_enough(old, old, rows, length)
                    memory[[first, second], :, :length] = memory[[second, first], :, :length]
        lengths[first], lengths[second] = lengths[second], lengths[first]

    def free(self, row: int) -> None:
        """Zero a row. Masked positions still multiply by 0, and 0 * NaN is NaN."""
        for memory in (*self._keys, *self._values):
            if memory.numel():
                memory[row : row + 1, :, : self.lengths[row]] = 0
        self.lengths[row] = 0

    def save(self, row: int) -> list[tuple[Tensor, Tensor]]:
        """Return a copy of a row's keys and values of each layer, (1, heads, tokens, width)."""
        place = (slice(row, row + 1), slice(None), slice(self.lengths[row]))
        return [
            (keys[place].clone(), values[place].clone())
            for keys, values in zip(self._keys, self._values, strict=True)
        ]

    def restore(self, row: int, saved: list[tuple[Tensor, Tensor]], length: int) -> None:
        """Write the first `length` tokens of a saved row into a free row."""
        for layer, pair in enumerate(saved):
            for layers, copy in zip((self._keys, self._values), pair, strict=True):
                if copy.numel():
                    memory = self._large_enough(layers[layer], copy, row + 1, length)
                    memory[row : row + 1, :, :length] = copy[:, :, :length]
                    layers[layer] = memory
        self.lengths[row] = length

    def get_seq_length(self, layer_idx: int = 0) -> int:
        window = self._opened()
        return window.longest - max(window.new)

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self._opened().longest, 0

    def _opened(self) -> Window:
        if self._window is None:
            raise UnsupportedError(
                "the KV cache was used outside of a pass; call open() before the model"
            )
        return self._window

    def _large_enough(self, memory: Tensor, new: Tensor, rows: int, length: int) -> Tensor:
        """Return the memory, at least doubled until so many rows and tokens fit."""
        have_rows, have_length = (memory.shape[0], memory.shape[2]) if memory.numel() else (0, 0)
        if rows <= have_rows and length <= have_length:
            return memory
        if rows > have_rows:
            rows = min(self.rows, max(rows, 2 * have_rows, 4))
        if length > have_length:
            length = min(self.length, max(length, 2 * have_length, 64))
        size = max(rows, have_rows), new.shape[1], max(length, have_length), new.shape[3]
        grown = new.new_zeros(*size)
        if memory.numel():
            grown[:have_rows, :, :have_length] = memory
        return grown
