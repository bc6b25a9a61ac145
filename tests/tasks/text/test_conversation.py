import json
import string

import pytest
from datasets import Dataset, load_dataset
from hypothesis import given
from hypothesis import strategies as st

from veratune.errors import DataError
from veratune.tasks.text.conversation import RowReader
from veratune.tasks.text.language import Instruction

CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
USER = {"role": "user", "content": "turn"}
ANSWER = {"role": "assistant", "content": "done"}
CALLED = [
    USER,
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "sunny"},
    ANSWER,
]
SHAREGPT = [
    {"from": "human", "value": "turn"},
    {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Rome"}}'},
    {"from": "observation", "value": "sunny"},
    {"from": "gpt", "value": "done"},
]


def read(row, **columns):
    dataset = Dataset.from_list([row], on_mixed_types="use_json")
    task = Instruction(columns)
    return task.conversations(dataset)[0]


FORMATS = {
    "messages": ({"messages": [USER, ANSWER]}, [USER, ANSWER]),
    "messages with tools": ({"messages": CALLED, "tools": [TOOL]}, CALLED),
    "sharegpt": ({"conversations": SHAREGPT, "tools": json.dumps([TOOL])}, CALLED),
    "alpaca": (
        {"instruction": "turn", "input": "it", "output": "done"},
        [{"role": "user", "content": "turn\n\nit"}, ANSWER],
    ),
    "alpaca with history": (
        {"instruction": "turn", "input": "", "output": "done", "history": [["turn", "done"]]},
        [USER, ANSWER, USER, ANSWER],
    ),
    "prompt and completion": ({"prompt": "turn", "completion": "done"}, [USER, ANSWER]),
    "prompt and completion as messages": (
        {"prompt": [USER], "completion": [ANSWER]},
        [USER, ANSWER],
    ),
    "messages and a system column": (
        {"messages": [USER, ANSWER], "system": "be good"},
        [{"role": "system", "content": "be good"}, USER, ANSWER],
    ),
}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_every_format_is_converted(name, kind, tmp_path):
    row, messages = FORMATS[name]
    path = tmp_path / f"rows.{kind}"
    if kind == "jsonl":
        path.write_text(json.dumps(row) + "\n")
    else:
        Dataset.from_list([row]).to_parquet(path)
    task = Instruction()
    examples = task.load_examples(str(path))
    found = task.conversations(examples)[0]
    assert found.messages == messages
    assert task.used_columns(examples) == set(row)
    assert [t["function"]["name"] for t in found.tools] == ["weather"] * ("tools" in row)


def test_arguments_of_another_row_are_not_mixed_in(tmp_path):
    other = {"type": "function", "function": {"name": "sum", "arguments": {"x": 1, "y": None}}}
    rows = [
        {"messages": [USER, {"role": "assistant", "tool_calls": [call]}], "tools": [TOOL]}
        for call in (CALL, other)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = Instruction()
    found = task.conversations(task.load_examples(str(tmp_path / "rows.jsonl")))
    arguments = [c.messages[1]["tool_calls"][0]["function"]["arguments"] for c in found]
    assert arguments == [{"city": "Rome"}, {"x": 1, "y": None}]
    Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")  # structs: fields of both rows
    found = task.conversations(task.load_examples(str(tmp_path / "rows.parquet")))
    arguments = [c.messages[1]["tool_calls"][0]["function"]["arguments"] for c in found]
    assert arguments == [{"city": "Rome"}, {"x": 1}]


def test_parts_null_content_reasoning_and_arguments_as_text():
    parts = [{"type": "text", "text": "tu"}, {"type": "text", "text": "rn"}]
    flat = {"id": "a", "name": "weather", "arguments": '{"city": "Rome"}'}
    row = [
        {"role": "developer", "content": "be good"},
        {"role": "user", "content": parts},
        {"role": "assistant", "content": None, "tool_calls": [flat], "reasoning": "hm"},
        {"role": "tool", "content": "sunny", "tool_call_id": "a", "name": "weather"},
        {"role": "assistant", "content": "done", "weight": 0},
    ]
    found = read({"messages": row})
    assert found.messages == [
        {"role": "system", "content": "be good"},
        {"role": "user", "content": "turn"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"id": "a", **CALL}],
            "reasoning_content": "hm",
        },
        {"role": "tool", "content": "sunny", "tool_call_id": "a", "name": "weather"},
        {"role": "assistant", "content": "done"},
    ]
    assert found.weights == [None, None, None, None, 0]
    assert found.trained_turns("weights") == [2]
    with pytest.raises(ValueError, match="weights, which --train-on all does not read"):
        found.trained_turns("all")


def test_which_turns_carry_the_loss():
    talk = read({"messages": [USER, ANSWER, USER, ANSWER]})
    assert talk.trained_turns("all") == talk.trained_turns("weights") == [1, 3]
    assert talk.trained_turns("last") == [3]
    row = {"prompt": [USER, ANSWER, USER], "completion": [ANSWER], "system": "be good"}
    assert read(row).trained_turns("all") == [4]  # the prompt's own answer is none to learn
    with pytest.raises(ValueError, match="every turn of the assistant has weight 0"):
        read({"messages": [USER, ANSWER | {"weight": 0}]}).trained_turns("weights")


def calls(**function):
    return {"messages": [USER, {"role": "assistant", "tool_calls": [{"function": function}]}]}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            calls(name="f", arguments="{x"),
            "row 0, column 'messages': message 1: the arguments of the call of 'f': '{x' is no JSON",
        ),
        (calls(name="f", arguments="[1]"), "call of 'f' are \\[1\\]; a JSON object is wanted"),
        (calls(name="f"), "call of 'f' are None; a JSON object is wanted"),
        (calls(arguments="{}"), "function is .*; {name, arguments} is wanted"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "role is 'robot'; it must be one of"),
        ({"messages": [USER | {"mood": "x"}, ANSWER]}, "message 0: .* the field 'mood'"),
        ({"messages": [USER | {"weight": 1}, ANSWER]}, "message 0: .* the field 'weight'"),
        ({"messages": [USER, ANSWER | {"weight": 2}]}, "weight is 2; it must be 0 or 1"),
        ({"messages": [{"role": "user", "content": None}]}, "neither content nor tool_calls"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]},
            "this task reads parts {type: text, text} only",
        ),
        (
            {"messages": [*CALLED[:2], {**CALLED[2], "tool_call_id": "q"}, ANSWER]},
            "message 2: tool_call_id is 'q', the id of no earlier call",
        ),
        ({"conversations": [{"from": "elf", "value": "x"}]}, "from is 'elf'; it must be one of"),
        (
            {"conversations": [{"from": "function_call", "value": "f(x)"}]},
            "function_call: 'f\\(x\\)' is no JSON",
        ),
        ({"messages": [USER, ANSWER], "tools": "[{]"}, "row 0, column 'tools': .* is no JSON"),
        ({"messages": [USER, ANSWER], "tools": "[{}]"}, "a function with a name is wanted"),
        (
            {"messages": [{"role": "system", "content": "a"}, USER, ANSWER], "system": "b"},
            "column 'system': the messages begin with another system message",
        ),
        ({"prompt": [USER], "input": "x", "completion": "y"}, "column 'input': it goes with a pro"),
        (
            {"instruction": "x", "output": "y", "history": [["only one"]]},
            "column 'history': .*; a pair of instruction and response is wanted",
        ),
    ],
)
def test_what_is_refused_is_named(row, message):
    with pytest.raises(DataError, match=message):
        read(row)


texts = st.text(string.ascii_letters, min_size=1, max_size=8)
values = st.one_of(texts, st.integers(2, 9), st.dictionaries(texts, texts, max_size=2))
fields = st.sampled_from(
    ["role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content", "weight"]
)
turns = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "tool"]), "content": texts},
    optional={
        "name": texts,
        "reasoning_content": texts,
        "tool_calls": st.just([CALL]),
        "weight": st.integers(0, 1),
    },
)


@given(st.lists(turns, min_size=1, max_size=4), texts | fields, values, st.integers(0, 3))
def test_every_field_is_in_the_conversation_or_refused(messages, key, value, at):
    messages = [dict(message) for message in messages]
    messages[at % len(messages)].setdefault(key, value)
    reader = RowReader({"messages": "messages"}, {})
    try:
        found = reader.read(0, {"messages": messages})
    except DataError as error:
        assert "row 0, column 'messages': message" in str(error)
        return
    for given_message, made, weight in zip(messages, found.messages, found.weights, strict=True):
        assert made | ({"weight": weight} if "weight" in given_message else {}) == given_message


def test_a_real_tool_call_column_survives_its_files(tmp_path):
    row = {"messages": CALLED, "tools": [TOOL]}
    (tmp_path / "rows.json").write_text(json.dumps([row, row]))
    examples = load_dataset("json", data_files=str(tmp_path / "rows.json"), split="train")
    assert [c.messages for c in Instruction().conversations(examples)] == [CALLED, CALLED]
