"""TokenTexts: the text and the bytes of single tokens, for log probabilities."""

import re
from functools import cached_property

from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SPACE = "\u2581"  # the space of SentencePiece and Metaspace vocabularies


class TokenTexts:
    """Texts of one tokenizer's tokens.

    `decode([token])` is not a token's text: it drops the leading space of SentencePiece tokens, and
    half of a character becomes a replacement character.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Read how the tokenizer writes bytes."""
        self.tokenizer = tokenizer
        backend = getattr(tokenizer, "backend_tokenizer", None)
        self._byte_level = "ByteLevel" in repr(getattr(backend, "decoder", ""))

    def bytes_of(self, token: int) -> bytes:
        """A token's bytes, which may be a part of a character."""
        word = self.tokenizer.convert_ids_to_tokens([token])[0]
        if word is None:
            return b""
        if token in self._special:
            return str(word).encode()
        if match := _BYTE.fullmatch(word):
            return bytes([int(match[1], 16)])
        if self._byte_level and all(character in self._bytes for character in word):
            return bytes(self._bytes[character] for character in word)
        return str(word).replace(_SPACE, " ").encode()

    def text_of(self, token: int) -> str:
        """A token's text."""
        return self.bytes_of(token).decode(errors="replace")

    def name_of(self, token: int) -> str:
        r"""A token's text; "bytes:\xe2\x82" for a part of a character, as OpenAI has it."""
        data = self.bytes_of(token)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def is_special(self, token: int) -> bool:
        """Whether a token has no text in a completion."""
        return token in self._special

    @cached_property
    def _special(self) -> frozenset[int]:
        return frozenset(self.tokenizer.all_special_ids)

    @cached_property
    def _bytes(self) -> dict[str, int]:
        return {character: byte for byte, character in bytes_to_unicode().items()}
