"""Rows with recordings as features and labels of a speech model."""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from datasets import Features, List, Value
from torch import Tensor, nn
from transformers import WhisperConfig

from veratune.errors import DataError
from veratune.tasks.multimodal.media import media_of
from veratune.tasks.multimodal.sound import MAX_BYTES, read_sound
from veratune.tasks.text.language import IGNORED

ENCODED = Features(
    {
        "audio": {"bytes": Value("large_binary"), "path": Value("string")},
        "labels": List(Value("int32")),
        "seconds": Value("float32"),
    }
)


@dataclasses.dataclass
class SpeechEncoder:
    """Encodes rows for Dataset.map.

    Attributes:
        columns: The column of each role.
        processor: The model's processor.
        config: The model's configuration.
        max_seconds: Longest recording.
    """

    columns: Mapping[str, str]
    processor: Any
    config: Any
    max_seconds: float

    def __call__(self, row: Mapping[str, Any], number: int) -> dict[str, Any]:
        """Encode one row.

        Args:
            row: Its values by column.
            number: Its number.

        Raises:
            DataError: Names the row and the column.
        """
        rate = self.processor.feature_extractor.sampling_rate
        folder = row[self.columns["media_folder"]] if "media_folder" in self.columns else ""
        role = "audio"
        try:
            audio = media_of(row[self.columns["audio"]], folder, MAX_BYTES, allow_urls=False)
            samples = len(read_sound(audio, rate, self.max_seconds))
            role = "text"
            text = row[self.columns["text"]]
            if not isinstance(text, str) or not text.strip():
                raise ValueError(f"{text!r}; text is wanted")
            whisper = isinstance(self.config, WhisperConfig)
            labels = self._tokens(text) if whisper else self._characters(text, samples)
        except ValueError as error:
            column = self.columns[role]
            raise DataError(f"row {number}, column {column!r}: {error}") from None
        return {"audio": audio, "labels": labels, "seconds": samples / rate}

    def _tokens(self, text: str) -> list[int]:
        """Whisper's labels, without the first token, which the model puts there itself."""
        ids = list(self.processor.tokenizer(text).input_ids)
        if ids[:1] == [self.config.decoder_start_token_id]:
            ids = ids[1:]
        most = self.config.max_target_positions
        if len(ids) > most:
            raise ValueError(f"{len(ids)} tokens; the model writes at most {most}")
        return ids

    def _characters(self, text: str, samples: int) -> list[int]:
        """CTC's labels: a character each, which all must have a place in the sound."""
        tokenizer = self.processor.tokenizer
        ids = list(tokenizer(text).input_ids)
        if tokenizer.unk_token_id in ids:
            unknown = sorted(
                character
                for character in set(text)
                if tokenizer.unk_token_id in tokenizer(character).input_ids
            )
            raise ValueError(
                f"the characters {' '.join(unknown)} are not in the model's vocabulary; write the "
                f"text with {_alphabet(tokenizer)}"
            )
        frames = output_frames(self.config, samples)
        # Between two equal characters CTC needs a blank.
        needed = len(ids) + sum(a == b for a, b in itertools.pairwise(ids))
        if needed > frames:
            raise ValueError(
                f"{len(ids)} characters need {needed} pieces of sound, but the recording has "
                f"{frames}; the text or the recording is wrong"
            )
        return ids


@dataclasses.dataclass
class SpeechCollator:
    """Makes a batch: the features of the recordings, and padded labels.

    Attributes:
        processor: The model's processor.
        max_seconds: Longest recording.
        dtype: Of the model.
    """

    processor: Any
    max_seconds: float
    dtype: torch.dtype = torch.float32

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        extractor = self.processor.feature_extractor
        rate = extractor.sampling_rate
        try:
            sounds = [read_sound(row["audio"], rate, self.max_seconds) for row in features]
        except ValueError as error:
            raise DataError(f"{error}; it was readable when the run began") from None
        # Whisper's features are always 30 seconds; the others are as long as the longest.
        padding = {} if hasattr(extractor, "chunk_length") else {"padding": True}
        batch = dict(extractor(sounds, sampling_rate=rate, return_tensors="pt", **padding))
        batch = {
            key: value.to(self.dtype) if value.is_floating_point() else value
            for key, value in batch.items()
        }
        labels = [torch.tensor(row["labels"], dtype=torch.long) for row in features]
        batch["labels"] = nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=IGNORED)
        return batch


def output_frames(config: Any, samples: int) -> int:
    """Pieces of sound that a CTC model's convolutions make of samples.

    Args:
        config: Its configuration, with conv_kernel and conv_stride.
        samples: Number of samples.
    """
    for kernel, stride in zip(config.conv_kernel, config.conv_stride, strict=True):
        samples = max(0, (samples - kernel) // stride + 1)
    return samples


def _alphabet(tokenizer: Any) -> str:
    letters = sorted(token for token in tokenizer.get_vocab() if len(token) == 1)
    return " ".join(letters[:60])
