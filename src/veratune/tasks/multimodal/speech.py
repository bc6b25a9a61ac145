"""Speech recognition: recordings to text, with Whisper or a CTC model such as Wav2Vec2."""

from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CTC_MAPPING,
    AutoConfig,
    AutoModelForCTC,
    AutoModelForSpeechSeq2Seq,
    AutoProcessor,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    WhisperConfig,
)

from veratune.errors import ConfigError, DataError
from veratune.loading import load_pretrained, loading_errors
from veratune.tasks.base import Task
from veratune.tasks.data import pick_columns
from veratune.tasks.multimodal.media import FOLDER, load_media_examples
from veratune.tasks.multimodal.speech_encoding import (
    ENCODED,
    SpeechCollator,
    SpeechEncoder,
    output_frames,
)
from veratune.tasks.text.language import IGNORED


class SpeechRecognition(Task):
    """Recordings and their texts; the score is the word error rate.

    Whisper writes the text token by token; a CTC model gives one character, or none, for every
    piece of sound.
    """

    name = "speech-recognition"
    roles = {
        "audio": ("audio", "file", "path", "speech"),
        "text": ("text", "sentence", "transcription", "transcript"),
        "media_folder": (FOLDER,),
    }
    optional = frozenset({"media_folder"})
    accepted_settings = frozenset({"max_seconds", "language"})
    metric = "wer"

    def __init__(
        self,
        columns: Mapping[str, str] | None = None,
        max_seconds: float = 30.0,
        language: str = "",
    ) -> None:
        """Bind the task to columns.

        Args:
            columns: The data's column for each role with an unusual name.
            max_seconds: Longest recording; Whisper hears 30 seconds at most.
            language: The language that a multilingual Whisper writes, such as "german".

        Raises:
            ConfigError: `max_seconds` is not over 0.
        """
        super().__init__(columns)
        if not 0 < max_seconds <= 3600:
            raise ConfigError(f"max_seconds is {max_seconds}; it must be over 0 and at most 3600")
        self.max_seconds, self.language = max_seconds, language
        self._config: PreTrainedConfig | None = None
        self._dtype = torch.float32

    def to_metadata(self) -> dict[str, Any]:
        return super().to_metadata() | {"max_seconds": self.max_seconds, "language": self.language}

    def load_examples(
        self, source: str, split: str = "train", config: str | None = None
    ) -> Dataset:
        return load_media_examples(source, split, config)

    def load_processor(self, model: str) -> Any:
        """Load the feature extractor and tokenizer.

        Raises:
            ConfigError: `language` does not fit the model.
            DataError: They cannot be loaded, or the model is neither Whisper nor a CTC model.
        """
        _word_error_rates(["a"], ["a"])  # the package is missing now, not after the training
        with loading_errors(model):
            config = AutoConfig.from_pretrained(model)
            processor: Any = AutoProcessor.from_pretrained(model)
        ctc = type(config) in MODEL_FOR_CTC_MAPPING and hasattr(config, "conv_kernel")
        if not isinstance(config, WhisperConfig) and not ctc:
            raise DataError(
                f"base model {model!r} is a {config.model_type}; task {self.name!r} knows Whisper, "
                "and CTC models that read samples, such as wav2vec2, hubert and wavlm"
            )
        self._config = config
        if isinstance(config, WhisperConfig):
            self._set_language(model, processor)
        elif self.language:
            raise ConfigError(f"language is {self.language!r}, which is for Whisper; leave it out")
        if processor.tokenizer.pad_token is None:
            processor.tokenizer.pad_token = processor.tokenizer.eos_token
        return processor

    def load_model(self, model: str, processor: Any, **options: Any) -> PreTrainedModel:
        auto = AutoModelForSpeechSeq2Seq if self._is_whisper else AutoModelForCTC
        loaded = load_pretrained(auto, model, **options)
        if not self._is_whisper:
            loaded.config.ctc_loss_reduction = "mean"  # a sum would grow with the batch
        self._dtype = loaded.dtype
        return loaded

    def encode(self, examples: Dataset, processor: Any, training: bool = False) -> Dataset:
        """Labels and the encoded recordings, each of which was decoded once.

        Raises:
            DataError: A recording is missing, unreadable or too long, or a text is empty, too long
                or has characters that the vocabulary lacks; the row and column are named.
        """
        assert self._config is not None
        columns = pick_columns(examples, self.roles, self.columns, self.optional)
        encoder = SpeechEncoder(columns, processor, self._config, self._seconds(processor))
        return examples.map(
            encoder,
            with_indices=True,
            remove_columns=examples.column_names,
            features=ENCODED,
            load_from_cache_file=False,  # a file may hold another recording now
            desc="Reading recordings",
        )

    def collator(self, processor: Any) -> SpeechCollator:
        return SpeechCollator(processor, self._seconds(processor), self._dtype)

    def score(
        self, model: nn.Module, encoded: Dataset, processor: Any, batch_size: int
    ) -> dict[str, float]:
        """Loss, word error rate and character error rate of greedy transcripts.

        Args:
            model: The model.
            encoded: From `encode`.
            processor: The processor.
            batch_size: Recordings in one forward pass.
        """
        loss, count, hypotheses, references = 0.0, 0, [], []
        device, was_training = next(model.parameters()).device, model.training
        model.eval()
        try:
            for batch in self._batches(encoded, processor, batch_size):
                tensors = {key: value.to(device) for key, value in batch.items()}
                trained = batch["labels"] != IGNORED
                weight = int(trained.sum()) if self._is_whisper else len(trained)
                with torch.inference_mode():
                    out = model(**tensors)
                    hypotheses += self._texts(model, processor, tensors, out.logits)
                loss += out.loss.item() * weight
                count += weight
                references += processor.tokenizer.batch_decode(
                    batch["labels"].masked_fill(~trained, processor.tokenizer.pad_token_id),
                    skip_special_tokens=True,
                    **self._grouping(),
                )
        finally:
            model.train(was_training)
        words, characters = _word_error_rates(references, hypotheses)
        return {"loss": loss / count, "wer": words, "cer": characters}

    def transcribe(
        self, model: nn.Module, processor: Any, encoded: Dataset, batch_size: int = 8
    ) -> list[str]:
        """Write the text of each recording, greedily.

        Args:
            model: The model, in evaluation mode.
            processor: Its processor.
            encoded: From `encode`.
            batch_size: Recordings in one forward pass.
        """
        device, texts = next(model.parameters()).device, []
        for batch in self._batches(encoded, processor, batch_size):
            inputs = {key: v.to(device) for key, v in batch.items() if key != "labels"}
            with torch.inference_mode():
                logits = None if self._is_whisper else model(**inputs).logits
                texts += self._texts(model, processor, inputs, logits)
        return texts

    def preview(self, encoded: Mapping[str, Any], processor: Any) -> list[tuple[str, bool]]:
        text = processor.tokenizer.decode(encoded["labels"], **self._grouping())
        return [(f"a recording of {encoded['seconds']:.1f} seconds\n", False), (str(text), True)]

    @property
    def _is_whisper(self) -> bool:
        return isinstance(self._config, WhisperConfig)

    def _grouping(self) -> dict[str, bool]:
        """Labels of CTC have real double letters; only transcripts merge repeated ones."""
        return {} if self._is_whisper else {"group_tokens": False}

    def _seconds(self, processor: Any) -> float:
        heard = processor.feature_extractor.chunk_length if self._is_whisper else self.max_seconds
        return float(min(self.max_seconds, heard))

    def _batches(self, encoded: Dataset, processor: Any, size: int) -> Iterator[dict[str, Tensor]]:
        collate = self.collator(processor)
        for start in range(0, len(encoded), size):
            rows = encoded.select(range(start, min(start + size, len(encoded))))
            yield collate([cast(Mapping[str, Any], row) for row in rows])

    def _texts(
        self, model: Any, processor: Any, inputs: Mapping[str, Tensor], logits: Tensor | None
    ) -> list[str]:
        """Transcripts of a batch: generated by Whisper, the likeliest characters of CTC."""
        if logits is None or self._is_whisper:
            language = {"language": self.language, "task": "transcribe"} if self.language else {}
            tokens = model.generate(
                inputs["input_features"],
                do_sample=False,
                num_beams=1,
                max_length=model.config.max_target_positions,
                # No recording is longer than the model hears at once, so nothing is sought in it.
                force_unique_generate_call=True,
                **language,
            )
            return list(processor.tokenizer.batch_decode(tokens, skip_special_tokens=True))
        tokens = logits.argmax(-1)
        if "attention_mask" in inputs:  # what is padding has no text
            for row, mask in zip(tokens, inputs["attention_mask"], strict=True):
                row[output_frames(model.config, int(mask.sum())) :] = model.config.pad_token_id
        return list(processor.tokenizer.batch_decode(tokens))

    def _set_language(self, model: str, processor: Any) -> None:
        """Set Whisper's first tokens; they say the language and that nothing is translated."""
        try:
            generation: Any = GenerationConfig.from_pretrained(model)
        except OSError:
            generation = None
        multilingual = bool(getattr(generation, "is_multilingual", False))
        if multilingual and not self.language:
            raise ConfigError(
                f"{model!r} knows many languages; say which with --language, such as english"
            )
        if self.language and not multilingual:
            raise ConfigError(
                f"language is {self.language!r}, but {model!r} knows one language; leave it out"
            )
        if self.language:
            try:
                processor.tokenizer.set_prefix_tokens(language=self.language, task="transcribe")
                processor.tokenizer("")
            except ValueError as error:
                raise ConfigError(f"language is {self.language!r}: {error}") from None


def _word_error_rates(references: list[str], hypotheses: list[str]) -> tuple[float, float]:
    """Word and character error rates, without any normalisation of the texts."""
    try:
        import jiwer
    except ImportError:
        raise ConfigError(
            "task speech-recognition needs the package jiwer: pip install 'veratune[multimodal]'"
        ) from None
    return float(jiwer.wer(references, hypotheses)), float(jiwer.cer(references, hypotheses))
