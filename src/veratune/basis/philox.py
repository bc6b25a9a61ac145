"""Philox4x32-10: a counter and a key in, four random 32-bit words out.

Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
The value at one counter depends on nothing else, so any block of a matrix can be made alone, in any
order, on any machine. All arithmetic is on integers: there is nothing to round.
"""

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint64]

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)
_ROUNDS = 10


def philox4x32(
    counter: tuple[Words, Words, Words, Words], key: tuple[int, int]
) -> tuple[Words, Words, Words, Words]:
    """Ten rounds of Philox on 32-bit words held in uint64 arrays that broadcast together.

    counter: four arrays of words; key: two words. Returns four arrays of words.

    >>> zero = np.zeros(1, np.uint64)
    >>> [hex(int(w[0])) for w in philox4x32((zero, zero, zero, zero), (0, 0))]
    ['0x6627e8d5', '0xe169c58d', '0xbc57ac4c', '0x9b00dbd8']
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        p0 = c0 * _MULTIPLIERS[0]
        p1 = c2 * _MULTIPLIERS[1]
        c0 = (p1 >> _HALF) ^ c1 ^ np.uint64(k0)
        c1 = p1 & _LOW
        c2 = (p0 >> _HALF) ^ c3 ^ np.uint64(k1)
        c3 = p0 & _LOW
        k0 = (k0 + _WEYL[0]) & 0xFFFFFFFF
        k1 = (k1 + _WEYL[1]) & 0xFFFFFFFF
    return c0, c1, c2, c3


def random_words(seed: int, role: int, rows: range, columns: int) -> NDArray[np.uint32]:
    """The 32-bit words of `rows` x `columns` of the matrix (seed, role), shape (len(rows),
    columns).

    Element (i, j) is word j mod 4 of Philox at counter (j // 4, i, low(role), high(role)) under the
    key (low(seed), high(seed)). seed, role: below 2**64; rows, columns: below 2**32.
    """
    groups = -(-columns // 4)
    counter = (
        np.arange(groups, dtype=np.uint64)[None, :],
        np.arange(rows.start, rows.stop, dtype=np.uint64)[:, None],
        np.full((1, 1), role & 0xFFFFFFFF, np.uint64),
        np.full((1, 1), role >> 32, np.uint64),
    )
    words = philox4x32(counter, (seed & 0xFFFFFFFF, seed >> 32))
    out = np.empty((len(rows), groups, 4), np.uint32)
    for lane, word in enumerate(words):
        out[:, :, lane] = word
    return out.reshape(len(rows), groups * 4)[:, :columns]
