import math
import shutil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from veratune.errors import DataError
from veratune.scoring.nlg import nist, nlg_scores, read_texts

OUTPUTS = [
    "The Vaults is a cheap pub near the river .",
    "Blue Spice is a coffee shop in the city centre.",
]
REFERENCES = [
    [
        "The Vaults is an inexpensive pub by the river.",
        "Near the river there is a cheap pub called The Vaults.",
    ],
    [
        "A coffee shop in the city centre area called Blue Spice.",
        "Blue Spice is a coffee shop in the city centre.",
    ],
]


def test_nist_by_hand():
    # Reference words: a a b; output a b. info(a) = log2(3 / 2), info(b) = log2(3), info(a b) = log2(2 / 1).
    one = (math.log2(3 / 2) + math.log2(3)) / 2 + math.log2(2) / 1
    shorter = math.exp(math.log(0.5) / math.log(1.5) ** 2 * math.log(2 / 3) ** 2)
    assert shorter == pytest.approx(0.5)
    assert nist([["a", "b"]], [[["a", "a", "b"]]]) == pytest.approx(one * shorter)
    # A word twice in the output counts as often as in the reference that has it most often.
    two = (2 * math.log2(4 / 3) + 0) / 3
    assert nist([["a", "a", "a"]], [[["a", "a"], ["a", "b"]]], order=1) == pytest.approx(two)


words = st.lists(st.sampled_from("abcd"), min_size=1, max_size=8)


@given(
    st.lists(st.tuples(words, st.lists(words, min_size=1, max_size=3)), min_size=1, max_size=4),
    st.randoms(),
)
def test_nist_knows_no_order_of_references_and_is_not_negative(rows, rng):
    outputs, groups = zip(*rows, strict=True)
    score = nist(outputs, groups)
    assert score >= 0
    mixed = [rng.sample(group, len(group)) for group in groups]
    assert nist(outputs, mixed) == pytest.approx(score)
    assert nist([["x"]] * len(rows), groups) == 0


def test_scores_of_a_fixed_output():
    """BLEU and NIST are those of the E2E challenge's own script on these lines."""
    found = nlg_scores(OUTPUTS, REFERENCES)
    assert found.bleu == pytest.approx(82.71558, abs=1e-5)
    assert found.nist == pytest.approx(5.182055, abs=1e-6)
    if shutil.which("java") is None:
        assert (found.meteor, found.rouge_l, found.cider) == (None, None, None)
    else:
        assert found.meteor == pytest.approx(57.12241, abs=1e-5)
        assert found.rouge_l == pytest.approx(83.33333, abs=1e-5)
        assert found.cider == pytest.approx(6.154753, abs=1e-6)


def test_without_java_only_what_needs_none(monkeypatch):
    monkeypatch.setenv("PATH", "")
    found = nlg_scores(OUTPUTS, REFERENCES)
    assert found.nist == pytest.approx(5.182055, abs=1e-6)
    assert (found.meteor, found.rouge_l, found.cider) == (None, None, None)


@pytest.mark.data
@pytest.mark.skipif(shutil.which("java") is None, reason="needs Java")
def test_one_reference_of_each_test_input_against_the_others(data):
    """BLEU and NIST as the E2E challenge's own script gave them for these 616 outputs."""
    import pyarrow.parquet

    groups = {}
    for row in pyarrow.parquet.read_table(data / "e2e_nlg" / "test.parquet").to_pylist():
        groups.setdefault(row["mr_id"], []).append(row["ref"])
    several = [group for group in groups.values() if len(group) > 1]
    found = nlg_scores([group[0] for group in several], [group[1:] for group in several])
    assert (len(several), found.bleu, found.nist) == (
        616,
        pytest.approx(60.4561908),
        pytest.approx(8.89883137),
    )
    assert (found.meteor, found.rouge_l, found.cider) == tuple(
        map(pytest.approx, (45.6309311, 63.8112907, 1.85722407))
    )


def test_an_empty_output_is_scored(tmp_path):
    found = nlg_scores(["", OUTPUTS[1]], REFERENCES)
    assert 0 < found.bleu < 82
    assert found.rouge_l is None or found.rouge_l == pytest.approx(50)


def test_files_and_mistakes(tmp_path):
    (tmp_path / "o").write_text("one\n\n")
    (tmp_path / "r").write_text("\none\nwon\n\n\ntwo\n\n")
    assert read_texts(tmp_path / "o", tmp_path / "r") == (["one", ""], [["one", "won"], ["two"]])
    with pytest.raises(DataError, match="no such file"):
        read_texts(tmp_path / "x", tmp_path / "r")
    with pytest.raises(DataError, match="1 outputs and 2 groups of references"):
        nlg_scores(["one"], REFERENCES)
    with pytest.raises(DataError, match="group 1 of the references is empty"):
        nlg_scores(OUTPUTS, [["a"], [" "]])
