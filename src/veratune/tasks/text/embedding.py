"""Sentence embeddings and rerankers, through sentence-transformers' models and losses."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from datasets import Dataset
from scipy.stats import spearmanr
from sklearn.metrics import average_precision_score, ndcg_score
from torch import Tensor, nn

from veratune.errors import ConfigError, DataError
from veratune.loading import loading_errors
from veratune.tasks.classes import output_heads
from veratune.tasks.data import pick_columns
from veratune.tasks.text.base import OnOverflow, TextTask

# The column names that sentence-transformers' losses take by position.
_TEXTS = ("anchor", "positive", "negative")


class SentenceTask(TextTask):
    """Base of tasks on a model of sentence-transformers, which tokenizes each batch itself."""

    accepted_settings = TextTask.accepted_settings | {"on_overflow"}
    greater_is_better = True
    transformers_model = False

    def __init__(
        self,
        columns: Mapping[str, str] | None = None,
        max_length: int = 256,
        on_overflow: OnOverflow = "truncate",
    ) -> None:
        """Bind the task to columns.

        Args:
            columns: The data's column for each role with an unusual name.
            max_length: Longest text, or pair of texts of a reranker, in tokens.
            on_overflow: What `encode` does with longer texts.

        Raises:
            ConfigError: `max_length` or `on_overflow` has an invalid value.
        """
        super().__init__(columns, max_length, on_overflow)

    def load_base(self, model: str, **options: Any) -> Any:
        raise NotImplementedError  # load_model builds the whole model

    def collator(self, processor: Any) -> Any:
        """None: sentence-transformers' trainers bring their own."""
        return None

    def preview(self, encoded: Mapping[str, Any], processor: Any) -> list[tuple[str, bool]]:
        return [(f"[{name}] {value}\n", True) for name, value in encoded.items()]

    def backbone(self, model: Any) -> nn.Module:
        """The transformers model inside, which gets the adapter and names its layers."""
        inner: nn.Module = model[0].auto_model
        return inner

    def _options(self, quantize: str | None, dtype: str) -> dict[str, Any]:
        if quantize is not None:
            raise ConfigError(
                f"quantize is {quantize!r}, but task {self.name!r} loads its model in full; leave "
                "it out"
            )
        return {"model_kwargs": {"dtype": getattr(torch, dtype)}, "device": "cpu"}

    def _read_texts(self, examples: Dataset, columns: Mapping[str, str]) -> dict[str, list[str]]:
        """The texts of each role; an empty one is refused."""
        found = {role: list(examples[columns[role]]) for role in _TEXTS if role in columns}
        for role, texts in found.items():
            for number, text in enumerate(texts):
                if not isinstance(text, str) or not text.strip():
                    raise DataError(
                        f"row {number}: {role} in column {columns[role]!r} is {text!r}; text is "
                        "wanted"
                    )
        return found

    def _without_long(
        self, rows: dict[str, list[Any]], lengths: list[int], training: bool
    ) -> Dataset:
        """Drop or refuse rows over max_length; truncation is left to the model, and reported."""
        long = {number for number, length in enumerate(lengths) if length > self.max_length}
        if long and self.on_overflow == "fail":
            first = min(long)
            raise self.overflow_error(first, lengths[first])
        action: OnOverflow = "drop" if training and self.on_overflow == "drop" else "truncate"
        self.report_overflows(len(long), len(lengths), action)
        if action == "drop":
            rows = {
                name: [value for number, value in enumerate(values) if number not in long]
                for name, values in rows.items()
            }
        return Dataset.from_dict(rows)


class Embedding(SentenceTask):
    """Sentence embeddings from pairs, triplets or scored pairs.

    Pairs (anchor, positive) and triplets (and negative) train by MultipleNegativesRankingLoss: the
    other texts of a batch are negatives. Scored pairs train by CoSENTLoss on cosine similarity.
    """

    name = "embedding"
    roles = {
        "anchor": ("anchor", "query", "sentence1", "text1", "question"),
        "positive": ("positive", "sentence2", "text2", "sentence", "answer"),
        "negative": ("negative",),
        "score": ("score", "similarity"),
    }
    optional = frozenset({"negative", "score"})
    metric = "ndcg@10"
    scored = False

    def fit_labels(self, examples: Dataset) -> None:
        self._form(examples)
        self.metric = "spearman" if self.scored else "ndcg@10"  # type: ignore[misc]

    def _form(self, examples: Dataset) -> dict[str, str]:
        """The column of each role; one kind of target only."""
        columns = pick_columns(examples, self.roles, self.columns, self.optional)
        if {"negative", "score"} <= set(columns):
            raise DataError(
                f"the data has a negative ({columns['negative']!r}) and a score "
                f"({columns['score']!r}); leave one out with another name for its column"
            )
        self.scored = "score" in columns
        return columns

    def load_model(self, model: str, processor: Any, **options: Any) -> Any:
        from sentence_transformers import SentenceTransformer

        chosen = self._options(options.get("quantize"), options.get("dtype", "float32"))
        with loading_errors(model):
            loaded = SentenceTransformer(model, **chosen)
        loaded.max_seq_length = self.max_length
        return loaded

    def encode(self, examples: Dataset, processor: Any, training: bool = False) -> Dataset:
        """Texts and scores under the names that sentence-transformers reads.

        Returns:
            Columns anchor, positive, and negative or score.
        """
        columns = self._form(examples)
        texts = self._read_texts(examples, columns)
        rows: dict[str, list[Any]] = dict(texts)
        if self.scored:
            rows["score"] = _numbers(examples, columns["score"])
        every = [_lengths(values, processor) for values in texts.values()]
        return self._without_long(
            rows, [max(group) for group in zip(*every, strict=True)], training
        )

    def score(
        self, model: nn.Module, encoded: Dataset, processor: Any, batch_size: int
    ) -> dict[str, float]:
        """Spearman's correlation of cosines and scores, or retrieval of each anchor's positives.

        Returns:
            spearman; or ndcg@10 and accuracy (the first hit is right) among all positives.
        """
        anchors = _embed(model, list(encoded["anchor"]), batch_size)
        if "score" in encoded.column_names:
            positives = _embed(model, list(encoded["positive"]), batch_size)
            cosines = (anchors * positives).sum(1).double().numpy()
            return {"spearman": float(spearmanr(cosines, encoded["score"]).statistic)}
        corpus = list(dict.fromkeys(encoded["positive"]))
        place = {text: i for i, text in enumerate(corpus)}
        relevant: dict[str, set[int]] = {}
        for anchor, positive in zip(encoded["anchor"], encoded["positive"], strict=True):
            relevant.setdefault(anchor, set()).add(place[positive])
        similarity = anchors @ _embed(model, corpus, batch_size).T
        gains = [
            ranking_scores(row.tolist(), relevant[anchor])
            for anchor, row in zip(encoded["anchor"], similarity, strict=True)
        ]
        return {
            "ndcg@10": sum(gain for gain, _ in gains) / len(gains),
            "accuracy": sum(first for _, first in gains) / len(gains),
        }


class Reranker(SentenceTask):
    """A cross-encoder: the relevance of a passage for a query, from labels 0 and 1 or in between.

    The loss is binary cross entropy.
    """

    name = "reranker"
    roles = {
        "anchor": ("query", "anchor", "question", "sentence1"),
        "positive": ("passage", "document", "positive", "sentence", "sentence2", "answer"),
        "score": ("label", "score", "labels"),
    }
    metric = "ndcg@10"
    head_lr = 1e-2

    def load_model(self, model: str, processor: Any, **options: Any) -> Any:
        from sentence_transformers import CrossEncoder

        chosen = self._options(options.get("quantize"), options.get("dtype", "float32"))
        with loading_errors(model):
            return CrossEncoder(model, num_labels=1, max_length=self.max_length, **chosen)

    def heads(self, model: nn.Module) -> tuple[str, ...]:
        return output_heads(self.backbone(model))

    def encode(self, examples: Dataset, processor: Any, training: bool = False) -> Dataset:
        """Columns anchor, positive (the passage) and score."""
        columns = pick_columns(examples, self.roles, self.columns)
        texts = self._read_texts(examples, columns)
        scores = _numbers(examples, columns["score"])
        wrong = next((i for i, score in enumerate(scores) if not 0 <= score <= 1), None)
        if wrong is not None:
            raise DataError(f"row {wrong}: the label is {scores[wrong]:g}; 0 to 1 is wanted")
        pairs = processor(texts["anchor"], texts["positive"])["input_ids"]
        return self._without_long({**texts, "score": scores}, [len(ids) for ids in pairs], training)

    def score(
        self, model: Any, encoded: Dataset, processor: Any, batch_size: int
    ) -> dict[str, float]:
        """NDCG@10 within each query's passages, and average precision over all pairs.

        Queries with one passage, or with passages of one label, rank nothing and are left out of
        NDCG.
        """
        pairs = list(zip(encoded["anchor"], encoded["positive"], strict=True))
        found = model.predict(pairs, batch_size=batch_size, show_progress_bar=False)
        labels = [float(score) for score in encoded["score"]]
        groups: dict[str, list[int]] = {}
        for number, (query, _) in enumerate(pairs):
            groups.setdefault(query, []).append(number)
        gains = [
            float(ndcg_score([[labels[i] for i in own]], [[float(found[i]) for i in own]], k=10))
            for own in groups.values()
            if len({labels[i] for i in own}) > 1
        ]
        scores = {"ndcg@10": sum(gains) / len(gains)} if gains else {}
        relevant = [label >= 0.5 for label in labels]
        return scores | {"average_precision": float(average_precision_score(relevant, found))}


def ranking_scores(similarity: list[float], relevant: set[int]) -> tuple[float, float]:
    """NDCG@10 and accuracy of one query.

    Args:
        similarity: The query's similarity to every document.
        relevant: The places of the documents that are right.

    Returns:
        NDCG of the ten most similar documents, and 1.0 if the most similar one is right.
    """
    order = sorted(range(len(similarity)), key=lambda i: -similarity[i])[:10]
    gain = sum(1 / math.log2(rank + 2) for rank, i in enumerate(order) if i in relevant)
    best = sum(1 / math.log2(rank + 2) for rank in range(min(len(relevant), 10)))
    return gain / best, float(order[0] in relevant)


def _embed(model: Any, texts: list[str], batch_size: int) -> Tensor:
    """Embeddings of length 1, shape (len(texts), width)."""
    found: Tensor = model.encode(
        texts,
        batch_size=batch_size,
        convert_to_tensor=True,
        normalize_embeddings=True,
        show_progress_bar=False,
    )
    return found.float().cpu()


def _lengths(texts: list[str], processor: Any) -> list[int]:
    return [len(ids) for ids in processor(texts)["input_ids"]]


def _numbers(examples: Dataset, column: str) -> list[float]:
    values = list(examples[column])
    for number, value in enumerate(values):
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise DataError(f"row {number}: {column} is {value!r}; a finite number is wanted")
    return [float(value) for value in values]
