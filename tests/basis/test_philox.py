import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from veratune.basis.philox import philox4x32, random_words

ONES = 0xFFFFFFFF


# Source: the known-answer file of Random123 (kat_vectors, philox4x32 with 10 rounds).
@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ONES,) * 4, (ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_known_answers(counter, key, answer):
    words = philox4x32(tuple(np.array([c], np.uint64) for c in counter), key)
    assert tuple(int(w[0]) for w in words) == answer


@given(
    st.integers(0, 2**64 - 1),
    st.integers(0, 2**64 - 1),
    st.integers(0, 1000),
    st.integers(1, 9),
    st.integers(1, 40),
)
def test_any_block_is_a_cut_of_the_whole(seed, role, start, rows, columns):
    block = random_words(seed, role, range(start, start + rows), columns)
    whole = random_words(seed, role, range(start + rows), columns + 7)
    assert np.array_equal(block, whole[start:, :columns])


def test_seed_role_row_and_column_all_matter():
    base = random_words(1, 2, range(4), 8)
    assert not np.array_equal(base, random_words(2, 2, range(4), 8))
    assert not np.array_equal(base, random_words(1, 3, range(4), 8))
    assert not np.array_equal(base, random_words(1 + 2**32, 2, range(4), 8))
    assert not np.array_equal(base, random_words(1, 2 + 2**32, range(4), 8))
    assert len(np.unique(random_words(1, 2, range(200), 200))) > 39_990
