"""Chat templates: conversations as the text that a model sees, and where the assistant speaks."""

import dataclasses
import hashlib
import importlib.util
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from veratune.errors import ConfigError, near
from veratune.tasks.text.conversation import Conversation, Message

# For tokenizers without a chat template, such as GPT-2's.
PLAIN_TEMPLATE = (
    "{% for m in messages %}### {{ m.role }}:\n{{ m.content }}{{ eos_token if m.role == "
    "'assistant' else '' }}{{ '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}### assistant:{{ '\n' }}{% endif %}"
)
_TOOL = {
    "type": "function",
    "function": {
        "name": "probe_tool",
        "description": "Probe.",
        "parameters": {"type": "object", "properties": {"x": {"type": "string"}}},
    },
}
_CALL = {"type": "function", "function": {"name": "probe_call", "arguments": {"x": "probe_value"}}}
_ASK: Message = {"role": "user", "content": "Hello"}
# For each field of a conversation: messages, tools, and the texts that a template must render.
_PROBES: dict[str, tuple[list[Message], list[dict[str, Any]], tuple[str, ...]]] = {
    "tools": ([_ASK], [_TOOL], ("probe_tool",)),
    "tool_calls": (
        [_ASK, {"role": "assistant", "content": "", "tool_calls": [_CALL]}],
        [_TOOL],
        ("probe_call", "probe_value"),
    ),
    "messages of role tool": (
        [
            _ASK,
            {"role": "assistant", "content": "", "tool_calls": [_CALL]},
            {"role": "tool", "name": "probe_call", "content": "probe_result"},
        ],
        [_TOOL],
        ("probe_result",),
    ),
    "reasoning_content": (
        [_ASK, {"role": "assistant", "content": "Hi", "reasoning_content": "probe_thought"}],
        [],
        ("probe_thought",),
    ),
    "messages of role system": (
        [{"role": "system", "content": "probe_system"}, _ASK],
        [],
        ("probe_system",),
    ),
    "name": (
        [{"role": "user", "content": "Hello", "name": "probe_name"}],
        [],
        ("probe_name",),
    ),
}


def render(
    conversation: Sequence[Message],
    tokenizer: PreTrainedTokenizerBase,
    add_generation_prompt: bool = False,
    tools: Sequence[dict[str, Any]] = (),
    chat_template: str | None = None,
) -> str:
    """Render a conversation as the text that the model sees.

    Args:
        conversation: The messages.
        tokenizer: The tokenizer; without a chat template of its own, PLAIN_TEMPLATE is taken.
        add_generation_prompt: End where the assistant's next message begins.
        tools: The tools that the assistant may call.
        chat_template: A template to use instead of the tokenizer's.
    """
    template = chat_template or (None if tokenizer.chat_template else PLAIN_TEMPLATE)
    return str(
        tokenizer.apply_chat_template(
            list(conversation),  # type: ignore[arg-type]  # messages may hold lists
            tools=list(tools) or None,
            chat_template=template,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
        )
    )


def with_parts(message: Message) -> Message:
    """A message with its content as a list of parts, as templates of vision-language models ask.

    Args:
        message: The message; an empty text has no part.
    """
    content = message["content"]
    if isinstance(content, list):
        return message
    return message | {"content": [{"type": "text", "text": content}] if content else []}


def template_hash(template: object) -> str:
    """The first digits of a chat template's SHA-256; of PLAIN_TEMPLATE where there is none.

    Args:
        template: A tokenizer's `chat_template`: its text, several by name, or None.
    """
    template = template or PLAIN_TEMPLATE
    text = template if isinstance(template, str) else json.dumps(template, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def read_chat_template(value: str) -> str:
    """The text of a chat template.

    Args:
        value: The text itself, a Jinja file, or the name of a template that TRL ships.

    Raises:
        ConfigError: There is no such file or template.
    """
    if "{%" in value or "{{" in value:
        return value
    if Path(value).is_file():
        return Path(value).read_text(encoding="utf-8")
    spec = importlib.util.find_spec("trl")
    if spec is None or spec.origin is None:
        raise ConfigError(
            f"chat_template is {value!r}, which is no file; the templates that TRL names come with "
            "pip install 'veratune[post]'"
        )
    shipped = {p.stem: p for p in (Path(spec.origin).parent / "chat_templates").glob("*.jinja")}
    if value not in shipped:
        raise ConfigError(
            f"chat_template is {value!r}, which is neither a file nor a template of TRL"
            f"{near(value, shipped)}"
        )
    return shipped[value].read_text(encoding="utf-8")


@dataclasses.dataclass(frozen=True)
class Piece:
    """A part of a rendered conversation.

    Attributes:
        text: The text.
        turn: Index of the message that the assistant generates with it; None for all else.
    """

    text: str
    turn: int | None


class ConversationRenderer:
    """Renders conversations and tells the assistant's turns from the rest.

    Where the template marks them with {% generation %}, by the marks. Elsewhere a turn is what the
    template renders of the conversation up to it, less what it renders as its prompt. A template
    that rewrites earlier turns allows no such difference: then TRL's training template is taken,
    if there is one for it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, parts: bool = False) -> None:
        """Bind the renderer to a tokenizer and choose the template.

        Args:
            tokenizer: The tokenizer, with its chat template.
            parts: Whether the template takes contents as lists of parts, as those of
                vision-language models do.
        """
        self.tokenizer, self.parts = tokenizer, parts
        self.template: str | None = None  # None: the tokenizer's own
        self._rendered: dict[str, str] = {}
        if not parts and not _has_marks(self._template()) and not self._keeps_prefixes():
            self.template = _training_template(tokenizer)

    def pieces(self, conversation: Conversation) -> list[Piece]:
        """A conversation as pieces of text, in order.

        Raises:
            ValueError: The template does not render a field, or cannot tell the turns.
        """
        self._check_fields(conversation)
        try:
            if _has_marks(self._template(conversation.tools)):
                return self._marked(conversation)
            return self._by_prefix(conversation)
        except ValueError:
            raise
        except Exception as error:  # a template may raise anything
            raise ValueError(
                f"the chat template refuses the conversation: {_line(error)}"
            ) from error

    def _template(self, tools: Sequence[dict[str, Any]] = ()) -> str:
        if self.template is not None:
            return self.template
        if not self.tokenizer.chat_template:
            return PLAIN_TEMPLATE
        return self.tokenizer.get_chat_template(tools=list(tools) or None)

    def _marked(self, conversation: Conversation) -> list[Piece]:
        """Pieces by the template's {% generation %} marks."""
        renderer: Any = render_jinja_template  # annotated as if it returned text alone
        texts, indices = renderer(
            [self._messages(conversation.messages)],
            tools=conversation.tools or None,
            chat_template=self._template(conversation.tools),
            return_assistant_tokens_mask=True,
            **self.tokenizer.special_tokens_map,
        )
        text: str = texts[0]
        spans = [(start, end) for start, end in indices[0] if end > start]
        turns = [i for i, m in enumerate(conversation.messages) if m["role"] == "assistant"]
        if len(spans) != len(turns):
            raise ValueError(
                f"the chat template marks {len(spans)} generations in a conversation with "
                f"{len(turns)} turns of the assistant"
            )
        pieces, at = [], 0
        for (start, end), turn in zip(spans, turns, strict=True):
            pieces += [Piece(text[at:start], None), Piece(text[start:end], turn)]
            at = end
        return [*pieces, Piece(text[at:], None)]

    def _by_prefix(self, conversation: Conversation) -> list[Piece]:
        """Pieces by the difference of a turn's prompt and the conversation up to the turn."""
        messages, pieces, text = conversation.messages, [], ""
        for turn, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prompt = self._render(messages[:turn], conversation.tools, True)
            whole = self._render(messages[: turn + 1], conversation.tools)
            if not whole.startswith(prompt) or not prompt.startswith(text):
                raise ValueError(
                    "the tokenizer's chat template rewrites earlier turns when later ones come, so "
                    "the answers cannot be told from the rest; give each answer as a row of its "
                    "own, or a template with {% generation %} marks as --chat-template"
                )
            pieces += [Piece(prompt[len(text) :], None), Piece(whole[len(prompt) :], turn)]
            text = whole
        return pieces

    def _render(
        self, messages: Sequence[Message], tools: Sequence[dict[str, Any]], prompt: bool = False
    ) -> str:
        return render(self._messages(messages), self.tokenizer, prompt, tools, self.template)

    def _messages(self, messages: Sequence[Message]) -> list[Message]:
        """The messages with their contents as the template takes them."""
        return [with_parts(message) for message in messages] if self.parts else list(messages)

    def _keeps_prefixes(self) -> bool:
        """Whether earlier turns render alike when later ones come."""
        answer: Message = {"role": "assistant", "content": "Hi", "reasoning_content": "Hm"}
        probe = Conversation([_ASK, answer, _ASK, answer], [], [None] * 4)
        try:
            self._by_prefix(probe)
        except ValueError:
            return False
        except Exception:  # such as a template that knows no such roles: its rows will tell
            return True
        return True

    def _check_fields(self, conversation: Conversation) -> None:
        """Raise ValueError for a field that the template would leave out."""
        for field in _fields_of(conversation):
            if field not in self._rendered:
                self._rendered[field] = self._probe(field)
            if problem := self._rendered[field]:
                raise ValueError(problem)

    def _probe(self, field: str) -> str:
        """Why the template does not render a field; "" where it does."""
        messages, tools, wanted = _PROBES[field]
        hint = "take another template with --chat-template, or remove them from the data"
        try:
            text = self._render(messages, tools)
        except Exception as error:  # a template may raise anything
            return f"the chat template refuses {field} ({_line(error)}); {hint}"
        if all(part in text for part in wanted):
            return ""
        return f"the chat template leaves out {field}; {hint}"


def check_turn(message: Message, text: str) -> None:
    """Raise ValueError if a rendered turn lacks the content, reasoning or calls of its message."""
    plain = "".join(text.split())
    parts = [("content", message["content"])]
    parts += [("reasoning_content", message.get("reasoning_content", ""))]
    for call in message.get("tool_calls", ()):
        parts.append(("tool_calls", call["function"]["name"]))
        keys = call["function"]["arguments"]
        parts += [("tool_calls", json.dumps(key, ensure_ascii=False)[1:-1]) for key in keys]
    for field, part in parts:
        if "".join(part.split()) not in plain:
            raise ValueError(
                f"the chat template leaves out the {field} of a turn that is trained on; take "
                "another template with --chat-template"
            )


def _fields_of(conversation: Conversation) -> list[str]:
    """The fields that a conversation has and that templates may leave out."""
    messages = conversation.messages
    roles = {message["role"] for message in messages}
    given = {
        "tools": bool(conversation.tools),
        "tool_calls": any("tool_calls" in message for message in messages),
        "messages of role tool": "tool" in roles,
        "messages of role system": "system" in roles,
        "reasoning_content": any("reasoning_content" in message for message in messages),
        "name": any("name" in m for m in messages if m["role"] != "tool"),
    }
    return [field for field, there in given.items() if there]


def _training_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """TRL's training template for a tokenizer; None without TRL, or where it has none."""
    if importlib.util.find_spec("trl") is None:
        return None
    from trl.chat_template_utils import get_training_chat_template

    try:
        return get_training_chat_template(tokenizer)
    except ValueError:
        return None


def _has_marks(template: str) -> bool:
    return re.search(r"\{%-?\s*generation\s*-?%\}", template) is not None


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
