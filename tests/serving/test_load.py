"""The base models' options: which attention they get, and what is refused before loading."""

import pytest

from tests import fakes
from veratune.errors import ConfigError
from veratune.serving.config import ServeConfig
from veratune.serving.load import load_encoder, load_engine


@pytest.mark.parametrize("name", ["eager", "sdpa"])
def test_both_base_models_get_the_attention_that_was_asked_for(tmp_path, name):
    model = fakes.folder(fakes.llama(num_hidden_layers=1), tmp_path / "llama")
    encoder = fakes.folder(fakes.bert(), tmp_path / "bert")
    config = ServeConfig(model=model, encoder=encoder, attn_implementation=name, device="cpu")
    assert load_engine(config).model.config._attn_implementation == name
    assert load_encoder(config).model.config._attn_implementation == name


def test_flash_attention_is_refused_where_it_cannot_run():
    with pytest.raises(ConfigError, match="takes no mask; .* --model wants sdpa or eager"):
        ServeConfig(model="m", attn_implementation="flash_attention_2")
    with pytest.raises(ConfigError, match="needs a GPU; sdpa is wanted"):
        ServeConfig(encoder="e", attn_implementation="flash_attention_2", device="cpu")
