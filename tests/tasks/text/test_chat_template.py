from pathlib import Path

import pytest
from datasets import Dataset

from tests import fakes
from veratune.errors import ConfigError, DataError
from veratune.tasks.text.chat_template import ConversationRenderer, read_chat_template
from veratune.tasks.text.conversation import Conversation
from veratune.tasks.text.language import IGNORED, Instruction

USER = {"role": "user", "content": "turn the light on"}
ANSWER = {"role": "assistant", "content": "done"}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
CALLED = [
    USER,
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "sunny"},
    ANSWER,
]
MARKED = (
    "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content }}{{ eos_token }}{% endgeneration %}{% else %}{{ m.content }}{{ eos_token }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def conversation(*messages, tools=()):
    return Conversation(list(messages), list(tools), [None] * len(messages))


def generated(renderer, found):
    return [piece.text for piece in renderer.pieces(found) if piece.turn is not None]


def with_template(template):
    tokenizer = fakes.tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def test_marks_and_prefixes_find_the_same_turns():
    talk = conversation(USER, ANSWER, USER, {"role": "assistant", "content": "ok"})
    for tokenizer in (fakes.tokenizer(), with_template(MARKED)):
        pieces = ConversationRenderer(tokenizer).pieces(talk)
        assert [p.text for p in pieces if p.turn is not None] == ["done</s>", "ok</s>"]
        assert [p.turn for p in pieces if p.turn is not None] == [1, 3]
        assert "".join(p.text for p in pieces) == (
            "<|user|>turn the light on</s><|assistant|>done</s>"
            "<|user|>turn the light on</s><|assistant|>ok</s>"
        )


def test_fields_that_a_template_leaves_out_are_refused():
    renderer = ConversationRenderer(fakes.tokenizer())
    for found, field in [
        (conversation(USER, ANSWER, tools=[TOOL]), "leaves out tools"),
        (conversation(*CALLED), "leaves out tool_calls"),
        (conversation(USER, ANSWER | {"reasoning_content": "hm"}), "leaves out reasoning_content"),
        (conversation(USER | {"name": "bob"}, ANSWER), "leaves out name"),
    ]:
        with pytest.raises(ValueError, match=f"the chat template {field}; take another template"):
            renderer.pieces(found)


def test_a_template_that_raises_is_named_with_its_row():
    tokenizer = with_template("{{ raise_exception('no such talk') }}")
    with pytest.raises(DataError, match="row 0: the chat template refuses .* no such talk"):
        Instruction().encode(Dataset.from_list([{"messages": [USER, ANSWER]}]), tokenizer)


def test_chosen_turns_carry_the_loss():
    tokenizer = fakes.tokenizer()
    talk = [USER, ANSWER | {"weight": 0}, USER, {"role": "assistant", "content": "ok", "weight": 1}]
    rows = Dataset.from_list([{"messages": talk}])
    found = Instruction(train_on="weights").encode(rows, tokenizer)[0]
    pairs = zip(found["input_ids"], found["labels"], strict=True)
    assert tokenizer.decode([t for t, label in pairs if label != IGNORED]) == "ok</s>"
    with pytest.raises(DataError, match="row 0: messages have weights"):
        Instruction().encode(rows, tokenizer)


SHIPPED = pytest.importorskip("trl").__file__
NAMES = sorted(p.stem for p in (Path(SHIPPED).parent / "chat_templates").glob("qwen*.jinja"))


@pytest.mark.parametrize("name", ["qwen2_5", "qwen2_5_training", "qwen3", "qwen3_training"])
def test_tool_calls_are_rendered_and_trained_on(name):
    tokenizer = with_template(read_chat_template(name))
    texts = generated(ConversationRenderer(tokenizer), conversation(*CALLED, tools=[TOOL]))
    assert '{"name": "weather", "arguments": {"city": "Rome"}}' in texts[0]
    assert texts[0].rstrip().endswith("<|im_end|>")
    assert texts[1].rstrip().endswith("done<|im_end|>")


def test_a_template_that_rewrites_history_gets_its_training_template():
    tokenizer = with_template(read_chat_template("qwen3"))
    thought = ANSWER | {"reasoning_content": "hm"}
    renderer = ConversationRenderer(tokenizer)
    assert renderer.template == read_chat_template("qwen3_training")
    texts = generated(renderer, conversation(USER, thought, USER, thought))
    assert len(texts) == 2
    assert "hm" in texts[1]


def test_every_template_of_the_table_trains_on_the_answer():
    for name in NAMES:
        if "vl" in name:  # its content is a list of parts
            continue
        texts = generated(
            ConversationRenderer(with_template(read_chat_template(name))),
            conversation(USER, ANSWER, USER, {"role": "assistant", "content": "ok"}),
        )
        assert ["done" in texts[0], "ok" in texts[1]] == [True, True], name


def test_a_template_of_its_own_is_stored_and_read_again(tmp_path):
    (tmp_path / "mine.jinja").write_text(MARKED)
    task = Instruction(chat_template=str(tmp_path / "mine.jinja"))
    again = Instruction(**{k: v for k, v in task.to_metadata().items() if k != "name"})
    assert again.chat_template == MARKED
    folder = fakes.folder(fakes.llama(), tmp_path / "base")
    assert again.load_processor(folder).chat_template == MARKED
    assert "chat_template" not in Instruction().to_metadata()
    with pytest.raises(ConfigError, match="neither a file nor a template of TRL; did you mean"):
        read_chat_template("qwen2.5")
