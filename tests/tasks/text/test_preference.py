"""Preference rows: every form of them, and what is refused."""

import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import fakes
from veratune.errors import ConfigError, DataError
from veratune.tasks.text.pairs import encode_turns, read_pair
from veratune.tasks.text.preference import Preference, completion_logps

USER = {"role": "user", "content": "turn the light"}
GOOD = {"role": "assistant", "content": "on please"}
BAD = {"role": "assistant", "content": "awful movie"}


@pytest.fixture(scope="module")
def tokenizer():
    return fakes.tokenizer()


def test_every_form_of_a_pair_is_the_same_pair():
    forms = [
        {"prompt": "turn the light", "chosen": "on please", "rejected": "awful movie"},
        {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": [USER], "chosen": "on please", "rejected": "awful movie"},
        {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"prompt": "turn the light", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"prompt": [USER], "chosen": [USER, GOOD | {"name": None}], "rejected": [USER, BAD]},
    ]
    pairs = [read_pair(0, form) for form in forms]
    assert all(pair == pairs[0] for pair in pairs)
    assert pairs[0].prompt == [USER]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "row 7: chosen and rejected are equal"),
        (
            {"chosen": [USER, GOOD], "rejected": [USER, GOOD]},
            "row 7: chosen and rejected are equal",
        ),
        ({"prompt": "a", "chosen": " ", "rejected": "b"}, "row 7: chosen is empty"),
        ({"prompt": "a", "chosen": "b", "rejected": ""}, "row 7: rejected is empty"),
        ({"prompt": "a", "chosen": None, "rejected": "b"}, "row 7: chosen is None"),
        ({"prompt": "a", "chosen": [], "rejected": "b"}, r"row 7: chosen is \[\]"),
        ({"prompt": " ", "chosen": "b", "rejected": "c"}, "row 7: the prompt is empty"),
        ({"chosen": "b", "rejected": "c"}, "row 7: there is no prompt"),
        ({"prompt": [USER, GOOD], "chosen": "b", "rejected": "c"}, "ends with the assistant"),
        ({"chosen": [GOOD], "rejected": [USER, BAD]}, "starts with the assistant, the other"),
        ({"chosen": [USER, GOOD], "rejected": [USER | {"content": "x"}, BAD]}, "no turn in common"),
        ({"prompt": "x", "chosen": [USER, GOOD], "rejected": [USER, BAD]}, "is not what chosen"),
        ({"prompt": "a", "chosen": [{"role": "user"}], "rejected": "c"}, "a message of chosen is"),
        (
            {"prompt": "a", "chosen": [GOOD | {"tool_calls": [1]}], "rejected": "c"},
            "has 'tool_calls'",
        ),
        ({"chosen": [USER, GOOD, USER], "rejected": [USER, BAD]}, "ends with role 'user'"),
        ({"chosen": [USER, USER, GOOD], "rejected": [USER, BAD]}, "starts with role 'user'"),
    ],
)
def test_bad_pairs_are_refused_with_their_row(row, message):
    with pytest.raises(DataError, match=message):
        read_pair(7, row)


@settings(max_examples=30, deadline=None)
@given(st.text("ab c", min_size=1), st.text("ab c", min_size=1), st.text("ab c", min_size=1))
def test_pairs_are_read_whole_or_refused(prompt, chosen, rejected):
    row = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    wrong = chosen == rejected or not all(text.strip() for text in row.values())
    if wrong:
        with pytest.raises(DataError, match="row 3: "):
            read_pair(3, row)
    else:
        pair = read_pair(3, row)
        read = [messages[-1]["content"] for messages in (pair.prompt, pair.chosen, pair.rejected)]
        assert read == [prompt, chosen, rejected]


def test_token_ids_are_the_template_of_the_whole_conversation(tokenizer):
    prompt, answer = encode_turns(0, [USER], [GOOD], tokenizer)
    assert tokenizer.decode(prompt + answer) == tokenizer.apply_chat_template(
        [USER, GOOD], tokenize=False
    )
    assert tokenizer.decode(answer) == "on please</s>"


def test_long_pairs_are_dropped_cut_or_refused(tokenizer):
    rows = Dataset.from_list(
        [
            {"prompt": "light", "chosen": "on", "rejected": "off"},
            {"prompt": "light", "chosen": "on " * 30, "rejected": "off " * 20},
        ]
    )
    with pytest.warns(UserWarning, match="1 of 2 examples .* dropped"):
        assert len(Preference(max_length=24).encode(rows, tokenizer)) == 1
    with pytest.warns(UserWarning, match="truncated"):
        cut = Preference(max_length=24, on_overflow="truncate").encode(rows, tokenizer)
    assert len(cut[1]["prompt_ids"] + cut[1]["chosen_ids"]) == 24
    with pytest.raises(DataError, match="row 1: "):
        Preference(max_length=24, on_overflow="fail").encode(rows, tokenizer)
    with pytest.raises(DataError, match="no token of the completion"):
        Preference(max_length=3, on_overflow="truncate").encode(rows, tokenizer)


def test_kto_reads_pairs_and_labels(tokenizer):
    pairs = Dataset.from_list([{"prompt": "light", "chosen": "on", "rejected": "off"}])
    encoded = Preference(loss="kto").encode(pairs, tokenizer, training=True)
    assert encoded["label"] == [True, False]
    rows = [{"prompt": "light", "completion": "on", "label": label} for label in (1, 0)]
    encoded = Preference(loss="kto").encode(Dataset.from_list(rows), tokenizer, training=True)
    assert encoded["label"] == [True, False]
    assert encoded["pair"] == [-1, -1]
    with pytest.raises(DataError, match="every completion has the label True"):
        Preference(loss="kto").encode(Dataset.from_list(rows[:1]), tokenizer, training=True)
    wrong = Dataset.from_list([rows[0] | {"label": 3}])
    with pytest.raises(DataError, match="row 0: label is 3"):
        Preference(loss="kto").encode(wrong, tokenizer)
    with pytest.raises(DataError, match="wants the columns chosen and rejected; the data has"):
        Preference(loss="dpo").encode(Dataset.from_list(rows), tokenizer)
    assert Preference(loss="kto").used_columns(pairs) == {"prompt", "chosen", "rejected"}


def test_log_probabilities_are_those_of_each_sequence_alone(tokenizer):
    model = fakes.llama()
    prompt, long = encode_turns(0, [USER], [GOOD], tokenizer)
    together = completion_logps(model, prompt, [long, long[:2]])
    alone = [completion_logps(model, prompt, [ids])[0] for ids in (long, long[:2])]
    assert together == pytest.approx(alone, abs=1e-5)


def test_the_system_message_comes_first(tokenizer):
    rows = Dataset.from_list([{"prompt": "light", "chosen": "on", "rejected": "off"}])
    task = Preference(system="be good")
    assert task.pairs(rows)[0].prompt[0] == {"role": "system", "content": "be good"}
    assert task.to_metadata()["system"] == "be good"


def test_a_loss_that_is_unknown_is_refused():
    with pytest.raises(ConfigError, match="one of dpo, ipo"):
        Preference(loss="dpp")
