"""Bodies for the encoder: embeddings, classes, scores, and ranks."""

from typing import Any, Literal

from pydantic import Field

from veratune.serving.http.schemas.base import ApiBody


class EmbeddingBody(ApiBody):
    """POST /v1/embeddings."""

    model: str
    input: str | list[int] | list[str] | list[list[int]]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(None, ge=1)
    user: str | None = None

    @property
    def inputs(self) -> list[str] | list[list[int]]:
        """The inputs as a list."""
        given: Any = self.input
        single = isinstance(given, str) or (given and isinstance(given[0], int))
        return [given] if single else given


class ClassifyBody(ApiBody):
    """POST /v1/classify."""

    model: str
    input: str | list[str]
    pair: str | list[str] | None = None

    @property
    def texts(self) -> list[str]:
        """The inputs as a list."""
        return [self.input] if isinstance(self.input, str) else self.input

    @property
    def pairs(self) -> list[str]:
        """The second texts as a list."""
        if self.pair is None:
            return []
        return [self.pair] if isinstance(self.pair, str) else self.pair


class ScoreBody(ApiBody):
    """POST /v1/score, as vLLM has it."""

    model: str
    text_1: str | list[str]
    text_2: str | list[str]

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """The pairs: one text against all, or as many against each other."""
        first = [self.text_1] if isinstance(self.text_1, str) else self.text_1
        second = [self.text_2] if isinstance(self.text_2, str) else self.text_2
        if len(first) == 1:
            first = first * len(second)
        return list(zip(first, second, strict=True)) if len(first) == len(second) else []


class Document(ApiBody):
    """A document of a rerank call."""

    text: str


class RerankBody(ApiBody):
    """POST /v1/rerank, as Jina, Cohere and vLLM have it."""

    model: str
    query: str
    documents: list[str | Document]
    top_n: int | None = Field(None, ge=1)
    return_documents: bool = True

    @property
    def texts(self) -> list[str]:
        """The documents' texts."""
        return [entry if isinstance(entry, str) else entry.text for entry in self.documents]
