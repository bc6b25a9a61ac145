"""Incremental detokenization: from tokens to text that may be sent."""

from collections.abc import Sequence
from typing import Protocol


class Decoder(Protocol):
    """The part of a tokenizer that turns tokens into text."""

    def decode(self, token_ids: list[int], skip_special_tokens: bool = ...) -> str | list[str]: ...


class Detokenizer:
    """Turn tokens into text piece by piece; text that was sent is never taken back.

    Two things are held back: bytes of an incomplete character, and text that may become a stop.

    Args:
        tokenizer: Decodes tokens.
        stop: Texts that end the completion and are not part of it.
        min_tokens: Tokens before which no stop counts.
        context: Last tokens of the prompt, where the text continues it. SentencePiece tokenizers
            drop the space of a text's first token.
    """

    def __init__(
        self,
        tokenizer: Decoder,
        stop: Sequence[str] = (),
        min_tokens: int = 0,
        context: Sequence[int] = (),
    ) -> None:
        self.tokenizer, self.stop = tokenizer, stop
        self.min_tokens = min_tokens + len(context)
        self.tokens: list[int] = list(context)
        self.stopped = False
        self._text = ""  # complete characters so far
        self._sent = 0
        self._context = 0  # decoding starts here, as text may depend on the token before
        self._decoded = len(context)  # tokens whose text is in _text

    def add(self, token: int) -> str:
        """Add a token and return the text that may be sent now."""
        self.tokens.append(token)
        pending = self._pending()
        if not pending.endswith("�"):
            self._text += pending
            self._context, self._decoded = self._decoded, len(self.tokens)
        return self._send(final=False)

    def end(self) -> str:
        """Return the remaining text after the last token."""
        if not self.stopped:
            self._text += self._pending()
            self._context = self._decoded = len(self.tokens)
        return self._send(final=True)

    def _pending(self) -> str:
        """Return the text of the tokens that are not in _text yet."""
        before = self.tokenizer.decode(
            self.tokens[self._context : self._decoded], skip_special_tokens=True
        )
        text = self.tokenizer.decode(self.tokens[self._context :], skip_special_tokens=True)
        return str(text)[len(before) :]

    def _send(self, final: bool) -> str:
        if self.stopped:
            return ""
        stop = self.stop if len(self.tokens) >= self.min_tokens else ()
        longest = max(map(len, stop), default=0)
        # What may begin a stop was held back, so a stop never begins in text that was sent.
        hits = [i for i in (self._text.find(text, self._sent) for text in stop) if i >= 0]
        end = len(self._text)
        if hits:
            self.stopped, end = True, min(hits)
        elif not final:
            for size in range(min(longest - 1, end), 0, -1):
                tail = self._text[end - size :]
                if any(text.startswith(tail) for text in stop):
                    end -= size
                    break
        piece = self._text[self._sent : end]
        self._sent = max(self._sent, end)
        return piece
