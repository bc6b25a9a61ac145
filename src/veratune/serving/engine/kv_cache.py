"""Keys and values of the rows that are being generated: a place for each row, of its own length, rows that come and go.

Rows that run stand one behind the other from place 0, so that a batch is a view of the memory and not a copy; when a row leaves, the last
one takes its place.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from veratune.errors import UnsupportedError


@dataclasses.dataclass
class Window:
    """What one forward pass reads and writes: rows from `first` on, and new tokens of each, at the right end of the input.

    new: how many of each row; positions: (rows, queries), of the new tokens, 0 or more where there is none; longest: tokens of the longest
    row with them; real: places in the flattened input that hold tokens, None where all do; index: where they go in the memory.
    """

    first: int
    new: list[int]
    positions: Tensor
    longest: int
    real: Tensor | None
    index: tuple[Tensor, slice, Tensor]


class KVCache(Cache):
    """A cache for transformers' causal models in which every row has its own length.

    Memory grows with the longest row in use: rows x tokens x 2 x width of keys for every layer.
    """

    def __init__(self, rows: int, length: int) -> None:
        """rows, length: the most rows at once, and the most tokens of one."""
        super().__init__(layers=[])
        self.rows, self.length = rows, length
        self.held = [0] * rows
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []
        self._window: Window | None = None

    def open(self, first: int, new: Sequence[int], device: torch.device) -> Window:
        """Say which rows the next forward pass is for, and how many tokens it adds to each: the last ones of an input as wide as the most of them."""
        most = max(new)
        ends = [held + own for held, own in zip(self.held[first:], new, strict=False)]
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

    def mask(self, dtype: torch.dtype, near: int | None = None) -> Tensor:
        """(rows, 1, queries, longest): 0 where a token sees another of its own row, up to itself, and the least number elsewhere.

        near: with a sliding window, how many of the last tokens are seen, itself among them.
        """
        window = self._opened()
        seen, own = (
            torch.arange(window.longest, device=window.positions.device),
            window.positions[:, :, None],
        )
        hidden = seen > own if near is None else (seen > own) | (seen <= own - near)
        return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill(
            hidden, torch.finfo(dtype).min
        )[:, None]

    @property
    def positions(self) -> Tensor:
        """(rows, queries)"""
        return self._opened().positions

    def close(self) -> None:
        """The pass is over: the rows hold its tokens, or what it wrote until it failed."""
        window = self._opened()
        for row, own in enumerate(window.new, window.first):
            self.held[row] += own
        self._window = None

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write the new keys and values (rows, heads, queries, width) in their places, and give back all of those rows."""
        window = self._opened()
        while len(self._keys) <= layer_idx:
            self._keys.append(key_states.new_empty(0, 0, 0, 0))
            self._values.append(value_states.new_empty(0, 0, 0, 0))
        end = window.first + len(window.new)
        out = []
        for held, new in ((self._keys, key_states), (self._values, value_states)):
            memory = held[layer_idx] = self._large_enough(held[layer_idx], new, end, window.longest)
            rows = memory[window.first : end]
            tokens = new.transpose(1, 2).flatten(0, 1)
            # Tokens first: advanced indices around a slice put their dimension in front.
            rows[window.index] = tokens if window.real is None else tokens[window.real]
            out.append(rows[:, :, : window.longest])
        return out[0], out[1]

    def swap(self, one: int, other: int) -> None:
        """Let two rows change places."""
        length = max(self.held[one], self.held[other])
        for held in (self._keys, self._values) if length else ():
            for layer, memory in enumerate(held):
                if memory.numel():
                    held[layer] = memory = self._large_enough(
                        memory, memory, max(one, other) + 1, length
                    )
                    memory[[one, other], :, :length] = memory[[other, one], :, :length]
        self.held[one], self.held[other] = self.held[other], self.held[one]

    def free(self, row: int) -> None:
        """Forget a row. Nothing of it stays: what is hidden from the next one in its place counts 0 times, and 0 times infinity is NaN."""
        for memory in (*self._keys, *self._values):
            if memory.numel():
                memory[row : row + 1, :, : self.held[row]] = 0
        self.held[row] = 0

    def save(self, row: int) -> list[tuple[Tensor, Tensor]]:
        """A copy of a row's keys and values (1, heads, tokens, width), for each layer; empty of layers that have none."""
        place = (slice(row, row + 1), slice(None), slice(self.held[row]))
        return [
            (keys[place].clone(), values[place].clone())
            for keys, values in zip(self._keys, self._values, strict=True)
        ]

    def restore(self, row: int, saved: list[tuple[Tensor, Tensor]], length: int) -> None:
        """Put the first `length` tokens of what was saved into a free row."""
        for layer, pair in enumerate(saved):
            for held, own in zip((self._keys, self._values), pair, strict=True):
                if own.numel():
                    held[layer] = memory = self._large_enough(held[layer], own, row + 1, length)
                    memory[row : row + 1, :, :length] = own[:, :, :length]
        self.held[row] = length

    def get_seq_length(self, layer_idx: int = 0) -> int:
        window = self._opened()
        return window.longest - max(window.new)

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self._opened().longest, 0

    def _opened(self) -> Window:
        if self._window is None:
            raise UnsupportedError("the cache was used outside of a pass that it was opened for")
        return self._window

    def _large_enough(self, held: Tensor, new: Tensor, rows: int, length: int) -> Tensor:
        """The memory, grown to twice what it was until these rows and tokens fit."""
        have = (held.shape[0], held.shape[2]) if held.numel() else (0, 0)
        if rows <= have[0] and length <= have[1]:
            return held
        wanted = (
            min(self.rows, max(rows, 2 * have[0], 4)) if rows > have[0] else have[0],
            min(self.length, max(length, 2 * have[1], 64)) if length > have[1] else have[1],
        )
        grown = new.new_zeros(wanted[0], new.shape[1], wanted[1], new.shape[3])
        if held.numel():
            grown[: have[0], :, : have[1]] = held
        return grown
