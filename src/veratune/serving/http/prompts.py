"""From request bodies to token ids: bounds on the size first, then the chat template and the tokenizer in a thread."""

import dataclasses
from collections.abc import Sequence

from veratune.serving.engine.engine import Engine
from veratune.serving.http.errors import ApiError
from veratune.serving.http.schemas import Message
from veratune.tasks.text.language import PLAIN_TEMPLATE


@dataclasses.dataclass
class PromptEncoder:
    """Turns conversations and texts into token ids for one engine."""

    engine: Engine

    def __post_init__(self) -> None:
        tokenizer = self.engine.tokenizer
        longest = max(map(len, tokenizer.get_vocab()), default=1)
        # No text of more characters fits, whatever its tokens are, so it need not be tokenized.
        self.max_characters = self.engine.max_model_len * longest

    def check_size(self, characters: int, param: str) -> None:
        """Raise ApiError for a text that cannot fit, before any work is done on it."""
        if characters > self.max_characters:
            raise ApiError(
                400,
                f"{param}: {characters} characters cannot fit into the "
                f"{self.engine.max_model_len} tokens of this model; shorten it",
                code="context_length_exceeded",
                param=param,
            )

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a conversation, up to where the assistant's next message begins.

        Raises:
            ApiError: The chat template refuses the messages.
        """
        # Templates know "system", which "developer" was called before.
        conversation = [
            {"role": "system" if m.role == "developer" else m.role, "content": m.text}
            for m in messages
        ]
        tokenizer = self.engine.tokenizer
        try:
            text = tokenizer.apply_chat_template(
                conversation,
                chat_template=None if tokenizer.chat_template else PLAIN_TEMPLATE,
                tokenize=False,
                add_generation_prompt=True,
            )
        except Exception as error:  # a template may raise anything
            reason = " ".join(str(error).split())[:200]
            raise ApiError(
                400,
                f"messages: the model's chat template refuses them: {reason}",
                param="messages",
            ) from error
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    def encode_text(self, text: str) -> list[int]:
        """Token ids of a text."""
        return list(self.engine.tokenizer(text)["input_ids"])
