"""Single tokens have their own text: with leading spaces, and bytes of half characters."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests import fakes
from veratune.serving.http.token_text import TokenTexts


def test_byte_level_tokens_join_to_the_text():
    tokenizer = fakes.tokenizer()
    texts = TokenTexts(tokenizer)
    for text in ("turn the light on", "naïve 日本 🙂", " a  b"):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert b"".join(map(texts.bytes_of, ids)).decode() == text
    assert texts.text_of(tokenizer.eos_token_id) == "</s>"


def test_metaspace_tokens_keep_their_leading_space():
    words = {"<unk>": 0, "\u2581park": 1, "\u2581the": 2, "ing": 3, "<0xE4>": 4}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>")
    texts = TokenTexts(tokenizer)
    assert [texts.text_of(i) for i in (1, 2, 3)] == [" park", " the", "ing"]
    assert texts.bytes_of(4) == b"\xe4"
    assert texts.text_of(4) == "\ufffd"
