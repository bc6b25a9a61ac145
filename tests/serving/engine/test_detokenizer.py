"""Text that is sent piece by piece is never taken back."""

from veratune.serving.engine.detokenizer import Detokenizer


class Letters:
    """A tokenizer of bytes: several tokens may be one character."""

    def decode(self, tokens, skip_special_tokens=True):
        return bytes(tokens).decode("utf-8", errors="replace")


def test_text_is_sent_in_whole_characters_and_never_a_stop_nor_its_beginning():
    text = Detokenizer(Letters())
    assert [text.add(token) for token in "aé€".encode()] == ["a", "", "é", "", "", "€"]
    stopped = Detokenizer(Letters(), stop=("END", "\n\n"))
    pieces = [stopped.add(token) for token in b"One EN END more"]
    assert "".join(pieces) == "One EN "
    assert stopped.stopped
    assert stopped.end() == ""
    open_ = Detokenizer(Letters(), stop=("END",))
    assert "".join(open_.add(token) for token in b"see EN") == "see "
    assert open_.end() == "EN"
