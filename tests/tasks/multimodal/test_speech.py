"""Speech recognition: rows with recordings, word error rates, and from rows to an adapter that writes."""

import io
import json
import wave

import numpy as np
import pytest
import torch
from datasets import Audio, Dataset

import veratune as vt
from tests.tasks.multimodal import models
from veratune.errors import ConfigError, DataError
from veratune.formats import native
from veratune.inference.adapted import load_with_adapter
from veratune.inference.evaluate import evaluate
from veratune.tasks.multimodal.sound import read_sound
from veratune.tasks.multimodal.speech import SpeechRecognition
from veratune.tasks.multimodal.speech_encoding import output_frames
from veratune.training.run import train
from veratune.training.settings import TrainSettings

pytest.importorskip("soundfile")
pytest.importorskip("jiwer")
pytestmark = pytest.mark.filterwarnings("ignore")


def recording(hertz=440.0, seconds=0.5, rate=16_000, channels=1) -> bytes:
    """A tone as a wav file."""
    times = np.arange(int(seconds * rate)) / rate
    samples = (np.sin(2 * np.pi * hertz * times) * 20_000).astype("<i2")
    out = io.BytesIO()
    with wave.open(out, "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(np.repeat(samples, channels).tobytes())
    return out.getvalue()


def write_rows(folder, rows, name="train"):
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def load(name, folder, **options):
    """A task, its processor and its model, as a run loads them."""
    base = models.folder(name, folder / name)
    task = SpeechRecognition(**options)
    processor = task.load_processor(base)
    return task, processor, task.load_model(base, processor, dtype="float32").eval()


@pytest.mark.parametrize(
    "name", [n if n in ("whisper", "wav2vec2") else pytest.param(n, marks=pytest.mark.slow) for n in models.SPEECH]
)  # fmt: skip
def test_a_model_learns_saves_loads_and_transcribes(name, tmp_path):
    base = models.folder(name, tmp_path / "model")
    rows = []
    for text, hertz in (("on", 200.0), ("off", 3000.0)):
        (tmp_path / f"{text}.wav").write_bytes(recording(hertz))
        rows.append({"audio": f"{text}.wav", "text": text})
    for split in ("train", "validation"):
        write_rows(tmp_path, rows * 4, split)
    result = train(
        TrainSettings(
            model=base, task="speech-recognition", data=str(tmp_path), out=str(tmp_path / "run"), lr=0.1, batch_size=8,
            epochs=12, device="cpu", preview=0, keep="last", save_steps=100,
        ),
        vt.VeraConfig(rank=32, targets="all-linear"),
    )  # fmt: skip
    assert result.after["loss"] < 0.9 * result.before["loss"]
    assert set(result.after) == {"loss", "wer", "cer"}
    assert native.read(result.path).task["name"] == "speech-recognition"
    loaded = load_with_adapter(base, result.path, device="cpu")
    scores = evaluate(loaded, str(tmp_path))
    assert scores == pytest.approx(result.after, rel=1e-3)
    encoded = loaded.task.encode(loaded.task.load_examples(str(tmp_path)), loaded.processor)
    assert len(loaded.task.transcribe(loaded.model, loaded.processor, encoded)) == 8


@pytest.mark.parametrize("name", models.SPEECH)
def test_a_batch_scores_as_its_rows_alone(name, tmp_path):
    """A short recording beside a long one has the loss and the transcript that it has alone."""
    task, processor, model = load(name, tmp_path)
    rows = []
    for text, seconds in (("turn on", 0.9), ("off", 0.3)):
        (tmp_path / f"{text}.wav").write_bytes(recording(300 * seconds, seconds))
        rows.append({"audio": f"{text}.wav", "text": text})
    encoded = task.encode(task.load_examples(str(write_rows(tmp_path, rows))), processor)
    alone = [task.score(model, encoded.select([i]), processor, 1) for i in range(2)]
    both = task.score(model, encoded, processor, 2)
    weights = [len(row["labels"]) if name == "whisper" else 1 for row in encoded]
    wanted = sum(s["loss"] * w for s, w in zip(alone, weights, strict=True)) / sum(weights)
    assert both["loss"] == pytest.approx(wanted, rel=1e-4)
    texts = [task.transcribe(model, processor, encoded.select([i]))[0] for i in range(2)]
    assert task.transcribe(model, processor, encoded) == texts


def test_frames_are_those_of_the_model(tmp_path):
    model, _ = models.ctc()
    for samples in (90, 400, 8000, 16_001):
        wanted = int(model._get_feat_extract_output_lengths(torch.tensor(samples)))
        assert output_frames(model.config, samples) == wanted


def test_recordings_of_all_kinds_are_the_same_samples(tmp_path):
    plain = read_sound({"bytes": recording()}, 16_000, 1)
    stereo = read_sound({"bytes": recording(channels=2)}, 16_000, 1)
    other_rate = read_sound({"bytes": recording(rate=48_000)}, 16_000, 1)
    np.testing.assert_allclose(stereo, plain, atol=1e-4)
    assert len(other_rate) == len(plain)
    np.testing.assert_allclose(other_rate[500:-500], plain[500:-500], atol=2e-2)


def test_a_parquet_file_with_recordings_is_not_decoded_by_datasets(tmp_path):
    rows = Dataset.from_dict({"audio": [{"bytes": recording(), "path": "a.wav"}], "text": ["on"]})
    rows.cast_column("audio", Audio()).to_parquet(tmp_path / "train.parquet")
    task, processor, _ = load("wav2vec2", tmp_path)
    (row,) = task.encode(task.load_examples(str(tmp_path / "train.parquet")), processor)
    assert row["seconds"] == pytest.approx(0.5)
    assert task.preview(row, processor) == [("a recording of 0.5 seconds\n", False), ("on", True)]


@pytest.mark.parametrize(
    ("name", "row", "problem"),
    [
        ("wav2vec2", {"audio": "gone.wav"}, "row 1, column 'audio': gone.wav: no such file in "),
        ("wav2vec2", {"audio": "broken.wav"}, "row 1, column 'audio': not a readable recording"),
        ("wav2vec2", {"audio": "empty.wav"}, "row 1, column 'audio': a recording without samples"),
        ("wav2vec2", {"audio": "long.wav"}, "row 1, column 'audio': 2.5 seconds; at most 2 are read"),
        ("whisper", {"audio": "long.wav"}, "row 1, column 'audio': 2.5 seconds; at most 1 are read"),
        ("wav2vec2", {"audio": "http://x.test/a.wav"}, "row 1, column 'audio': http://x.test/a.wav is a web address"),
        ("wav2vec2", {"text": " "}, "row 1, column 'text': ' '; text is wanted"),
        ("wav2vec2", {"text": "On é"}, "row 1, column 'text': the characters O é are not in the model's vocabulary; write the text with ' a b"),
        ("wav2vec2", {"text": "a" * 30}, "row 1, column 'text': 30 characters need 59 pieces of sound, but the recording has 49"),
        ("whisper", {"text": "kitchen " * 40}, "row 1, column 'text': .* tokens; the model writes at most 32"),
    ],
)  # fmt: skip
def test_bad_rows_are_named(name, row, problem, tmp_path):
    (tmp_path / "a.wav").write_bytes(recording())
    (tmp_path / "broken.wav").write_bytes(b"RIFF" + b"x" * 50)
    (tmp_path / "empty.wav").write_bytes(recording(seconds=0))
    (tmp_path / "long.wav").write_bytes(recording(seconds=2.5))
    task, processor, _ = load(name, tmp_path, max_seconds=2.0)
    good = {"audio": "a.wav", "text": "on"}
    examples = task.load_examples(str(write_rows(tmp_path, [good, good | row])))
    with pytest.raises(DataError, match=problem):
        task.encode(examples, processor)


def test_a_multilingual_whisper_wants_a_language(tmp_path):
    model, processor = models.whisper(("en", "zh", "de"))
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    base = str(tmp_path / "model")
    with pytest.raises(ConfigError, match="knows many languages; say which with --language"):
        SpeechRecognition().load_processor(base)
    with pytest.raises(ConfigError, match="language is 'klingon'"):
        SpeechRecognition(language="klingon").load_processor(base)
    (tmp_path / "a.wav").write_bytes(recording())
    path = write_rows(tmp_path, [{"audio": "a.wav", "text": "on"}])
    task = SpeechRecognition(language="german")
    loaded = task.load_processor(base)
    encoded = task.encode(task.load_examples(str(path)), loaded)
    text = loaded.tokenizer.decode(encoded[0]["labels"])
    assert text == "<|de|><|transcribe|><|notimestamps|>on<|endoftext|>"
    assert len(task.transcribe(task.load_model(base, loaded).eval(), loaded, encoded)) == 1


@pytest.mark.parametrize("name", ["whisper", "wav2vec2"])
def test_a_language_is_refused_where_there_is_one(name, tmp_path):
    base = models.folder(name, tmp_path / "model")
    with pytest.raises(ConfigError, match="leave it out"):
        SpeechRecognition(language="german").load_processor(base)


def test_other_models_are_refused(tmp_path):
    base = models.folder("llava", tmp_path / "model")
    with pytest.raises(DataError, match="is a llava; task 'speech-recognition' knows Whisper"):
        SpeechRecognition().load_processor(base)
