"""Encoder-decoders: texts to targets, from rows to an adapter that writes them."""

import json

import pytest
import transformers as hf
from datasets import Dataset

import veratune as vt
from tests import fakes
from veratune.errors import DataError
from veratune.formats import native
from veratune.inference.adapted import load_with_adapter
from veratune.inference.evaluate import evaluate
from veratune.tasks.text.seq2seq import Seq2Seq, write_targets
from veratune.training.run import train
from veratune.training.settings import TrainSettings

pytestmark = pytest.mark.filterwarnings("ignore")


def t5():
    config = hf.T5Config(
        vocab_size=300, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, dropout_rate=0.0, pad_token_id=1,
        eos_token_id=1, decoder_start_token_id=0,
    )  # fmt: skip
    return fakes.seeded(lambda: hf.T5ForConditionalGeneration(config))


def bart():
    config = hf.BartConfig(
        vocab_size=300, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=64, dropout=0.0, pad_token_id=1, bos_token_id=0,
        eos_token_id=1, decoder_start_token_id=0, forced_eos_token_id=None, init_std=fakes.LIVELY,
    )  # fmt: skip
    return fakes.seeded(lambda: hf.BartForConditionalGeneration(config))


@pytest.mark.parametrize("make", [t5, bart])
def test_a_model_learns_saves_loads_and_writes(make, tmp_path):
    fakes.folder(make(), tmp_path / "model")
    rows = [{"text": f"light {x}", "target": f"set {x}"} for x in ("on", "off")] * 8
    for split in ("train", "validation"):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{split}.jsonl").write_text(text)
    result = train(
        TrainSettings(
            model=str(tmp_path / "model"), task="seq2seq", data=str(tmp_path), out=str(tmp_path / "run"), lr=0.1,
            batch_size=8, epochs=12, max_length=16, device="cpu", preview=0, keep="last",
        ),
        vt.VeraConfig(rank=32, targets="all-linear"),
    )  # fmt: skip
    assert result.after["loss"] < 0.7 * result.before["loss"]
    assert native.read(result.path).task["name"] == "seq2seq"
    loaded = load_with_adapter(str(tmp_path / "model"), result.path, device="cpu")
    assert evaluate(loaded, str(tmp_path))["loss"] == pytest.approx(result.after["loss"], rel=1e-4)
    written = write_targets(loaded.model, loaded.processor, ["light on"], max_new_tokens=4)
    assert len(written) == 1


def test_both_sides_end_and_long_rows_are_reported():
    tokenizer, task = fakes.tokenizer(), Seq2Seq(max_length=8)
    rows = [{"text": "light", "target": "on"}, {"text": "light " * 20, "target": "on"}]
    with pytest.warns(UserWarning, match="1 of 2 examples"):
        (row,) = task.encode(Dataset.from_list(rows), tokenizer)
    end = tokenizer.eos_token_id
    assert row["input_ids"][-1] == row["labels"][-1] == end
    assert [on for _, on in task.preview(row, tokenizer)] == [False, True]
    for side in ("text", "target"):
        with pytest.raises(DataError, match=f"row 0: {side} is ' '"):
            task.encode(Dataset.from_list([rows[0] | {side: " "}]), tokenizer)
