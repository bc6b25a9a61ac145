import json

import pytest
from datasets import Dataset

from tests import fakes
from veratune.errors import ConfigError, DataError
from veratune.tasks.text import language
from veratune.tasks.text.chat_template import render
from veratune.tasks.text.conversation import Conversation
from veratune.tasks.text.language import IGNORED, CausalLM, Instruction

PAIR = {"prompt": "turn the light on", "completion": "done"}
TALK = [
    {"role": "user", "content": "turn the light on"}, {"role": "assistant", "content": "done"},
    {"role": "user", "content": "off"}, {"role": "assistant", "content": "ok"},
]  # fmt: skip


def encode(rows, tokenizer=None, **options):
    return Instruction(**options).encode(Dataset.from_list(rows), tokenizer or fakes.tokenizer())


def trained_text(encoded, tokenizer):
    return tokenizer.decode(
        [
            t
            for t, label in zip(encoded["input_ids"], encoded["labels"], strict=True)
            if label != IGNORED
        ]
    )


def test_the_loss_is_on_the_answer_alone():
    tokenizer = fakes.tokenizer()
    found = encode([PAIR], tokenizer)[0]
    assert (
        tokenizer.decode(found["input_ids"]) == "<|user|>turn the light on</s><|assistant|>done</s>"
    )
    assert trained_text(found, tokenizer) == "done</s>"
    assert all(
        t == label
        for t, label in zip(found["input_ids"], found["labels"], strict=True)
        if label != IGNORED
    )


def test_every_turn_of_the_assistant_counts():
    tokenizer = fakes.tokenizer()
    found = encode([{"messages": TALK}], tokenizer)[0]
    assert trained_text(found, tokenizer) == "done</s>ok</s>"
    assert [on for _, on in Instruction().preview(found, tokenizer)] == [False, True, False, True]


def test_the_prompt_is_tokenized_as_it_is_when_the_model_answers():
    tokenizer = fakes.tokenizer()
    found = encode([PAIR], tokenizer)[0]
    prompt = tokenizer(
        render(
            [{"role": "user", "content": PAIR["prompt"]}], tokenizer, add_generation_prompt=True
        ),
        add_special_tokens=False,
    )
    assert found["input_ids"][: len(prompt["input_ids"])] == prompt["input_ids"]


def test_system_message_and_input_column():
    tokenizer = fakes.tokenizer()
    found = encode([{**PAIR, "input": "in kitchen"}], tokenizer, system="be good")[0]
    assert tokenizer.decode(found["input_ids"]).startswith(
        "<|system|>be good</s><|user|>turn the light on\n\nin kitchen</s>"
    )


def test_a_tokenizer_without_a_template_gets_a_plain_one():
    tokenizer = fakes.tokenizer()
    tokenizer.chat_template = None
    found = encode([{"messages": TALK}], tokenizer)[0]
    assert tokenizer.decode(found["input_ids"]).startswith(
        "### user:\nturn the light on\n### assistant:\ndone</s>\n### user:\noff\n"
    )
    assert trained_text(found, tokenizer) == "done</s>\nok</s>\n"


def test_a_template_that_rewrites_history_is_refused():
    tokenizer = fakes.tokenizer()
    tokenizer.chat_template = "{{ messages|length }}" + tokenizer.chat_template
    with pytest.raises(DataError, match="row 0: .* chat template rewrites earlier turns"):
        encode([{"messages": TALK}], tokenizer)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [{"a": 1}],
            "no column for messages, nor a pair of prompt and completion; the data has a: say which",
        ),
        (
            [{"prompt": "x", "completion": None}],
            "row 0, column 'completion': None; text or messages are wanted",
        ),
        ([{"messages": TALK[:1]}], "row 0: the conversation has no turn of the assistant"),
        (
            [{"messages": [{"role": "user", "text": "x"}]}],
            "row 0, column 'messages': message 0: a message of role user has the field 'text'",
        ),
        (
            [{"messages": "hello"}],
            "row 0, column 'messages': 'hello'; a list of {role, content} is wanted",
        ),
        (
            [{"prompt": "turn the light " * 30, "completion": "x"}],
            "row 0: no token of the answer is within max_length = 40",
        ),
    ],
)
def test_bad_rows(rows, message):
    with pytest.raises(DataError, match=message):
        encode(rows, max_length=40, on_overflow="truncate")


LONG = {"prompt": "turn the light on", "completion": "please " * 20}


def test_an_empty_answer_is_counted():
    rows = [PAIR, PAIR | {"completion": " "}, PAIR | {"completion": ""}]
    with pytest.warns(
        UserWarning, match="2 of 3 rows train on an empty answer, the first is row 1"
    ):
        encode(rows)
    said = [TALK[0], {"role": "assistant", "content": "", "tool_calls": [{"type": "function"}]}]
    assert not Conversation(said, [], [None, None]).trains_empty("all")


def test_an_answer_that_is_too_long_is_dropped_and_counted():
    tokenizer = fakes.tokenizer()
    with pytest.warns(UserWarning, match="1 of 2 examples .* max_length = 20 .* were dropped"):
        found = encode([LONG, PAIR], tokenizer, max_length=20)
    assert [trained_text(example, tokenizer) for example in found] == ["done</s>"]
    with pytest.raises(DataError, match="all 1 examples have more than max_length = 20 tokens"):
        encode([LONG], tokenizer, max_length=20)


def test_a_truncated_answer_has_no_end():
    tokenizer = fakes.tokenizer()
    with pytest.warns(UserWarning, match="1 of 2 examples .* were truncated"):
        found = encode([LONG, PAIR], tokenizer, max_length=20, on_overflow="truncate")
    assert len(found[0]["input_ids"]) == 20
    assert not trained_text(found[0], tokenizer).endswith("</s>")
    assert trained_text(found[1], tokenizer).endswith("</s>")


def test_overflow_can_be_an_error():
    with pytest.raises(DataError, match=r"row 1: \d+ tokens, more than max_length = 20; raise"):
        encode([PAIR, LONG], max_length=20, on_overflow="fail")
    with pytest.raises(ConfigError, match="on_overflow is 'cut'; it must be one of drop"):
        Instruction(on_overflow="cut")


def test_an_input_column_beside_messages_is_not_read():
    rows = Dataset.from_list([{"messages": TALK, "input": "x"}])
    assert Instruction().used_columns(rows) == {"messages"}


def test_plain_text_is_cut_into_blocks():
    tokenizer = fakes.tokenizer()
    rows = Dataset.from_dict({"text": ["turn the light on", "", "off please"]})
    blocks = CausalLM(max_length=5).encode(rows, tokenizer)
    stream = [t for block in blocks for t in block["input_ids"]]
    assert tokenizer.decode(stream) in (
        "turn the light on</s>off please</s>",
        "turn the light on</s>off please",
    )  # a last token alone has nothing before it
    assert all(len(block["input_ids"]) <= 5 for block in blocks)
    assert all(block["labels"] == block["input_ids"] for block in blocks)
    with pytest.raises(DataError, match="holds no text at all"):
        CausalLM().encode(Dataset.from_dict({"text": ["", ""]}), tokenizer)


def test_batches_are_padded_and_the_padding_is_no_target():
    task, tokenizer = Instruction(), fakes.tokenizer()
    encoded = encode([PAIR, {"prompt": "off", "completion": "ok"}], tokenizer)
    batch = task.collator(tokenizer)([encoded[0], encoded[1]])
    assert batch["input_ids"].shape == batch["labels"].shape
    assert (batch["labels"][batch["attention_mask"] == 0] == IGNORED).all()


def test_a_large_data_set_is_encoded_once_and_read_from_its_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(language, "CACHED_FROM", 2)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("datasets.fingerprint._CACHING_ENABLED", True)  # other tests turn it off
    rows = [{"prompt": "turn the light on", "completion": word} for word in ("done", "ok", "off")]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task, tokenizer = Instruction(), fakes.tokenizer()
    first = task.encode(task.load_examples(str(tmp_path / "rows.jsonl")), tokenizer)
    monkeypatch.setattr(language, "check_turn", None)  # an example encoded again would call it
    again = task.encode(task.load_examples(str(tmp_path / "rows.jsonl")), tokenizer)
    assert first[:] == again[:]
    with pytest.raises(TypeError):
        Instruction(train_on="last").encode(
            task.load_examples(str(tmp_path / "rows.jsonl")), tokenizer
        )
