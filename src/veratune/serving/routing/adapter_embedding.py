"""AdapterEmbedding: what an adapter's training inputs look like, as a few vectors of length 1."""

import dataclasses
import json

import numpy as np
import safetensors
import safetensors.numpy
from numpy.typing import NDArray

from veratune.errors import ConfigError, StoreError

MIN_EXAMPLES = 5
CENTROIDS = 4
_FOLDS = 4
_FALSE_FALLBACKS = 0.05  # share of an adapter's own inputs that may fall back to the base
_MAX_BYTES = 2**20
_METADATA = "veratune_routing"
Vectors = NDArray[np.float32]


@dataclasses.dataclass(frozen=True)
class AdapterEmbedding:
    """The embedding of one adapter's training inputs.

    Attributes:
        embedder: The id of the model that made it.
        centroids: Shape (centroids, width), rows of length 1.
        threshold: An input whose largest cosine is below it is none of this adapter's.
        examples: How many inputs it was made from.
    """

    embedder: str
    centroids: Vectors
    threshold: float
    examples: int

    @classmethod
    def fit(cls, embedder: str, vectors: Vectors) -> "AdapterEmbedding":
        """Make the embedding of an adapter.

        The threshold is the 5% quantile of the cosines of inputs that were left out, a quarter at
        a time.

        Args:
            embedder: The id of the model that made the vectors.
            vectors: Of the training inputs, shape (inputs, width), rows of length 1.

        Raises:
            ConfigError: There are too few inputs.
        """
        cls.check_count(len(vectors))
        fold = np.arange(len(vectors)) % _FOLDS
        left_out = [
            (vectors[fold == i] @ _centroids(vectors[fold != i]).T).max(1) for i in range(_FOLDS)
        ]
        threshold = float(np.quantile(np.concatenate(left_out), _FALSE_FALLBACKS))
        return cls(embedder, _centroids(vectors), threshold, len(vectors))

    @staticmethod
    def check_count(inputs: int) -> None:
        """Raise ConfigError for too few inputs."""
        if inputs < MIN_EXAMPLES:
            raise ConfigError(
                f"{inputs} different example inputs; at least {MIN_EXAMPLES} are wanted"
            )

    def encode(self) -> bytes:
        """The embedding as bytes of a safetensors file."""
        record = {
            "embedder": self.embedder,
            "threshold": self.threshold,
            "examples": self.examples,
        }
        return safetensors.numpy.save(
            {"centroids": self.centroids}, {_METADATA: json.dumps(record)}
        )

    @classmethod
    def decode(cls, data: bytes) -> "AdapterEmbedding":
        """Read `encode`'s bytes. Raises StoreError for others."""
        try:
            if len(data) > _MAX_BYTES:
                raise ValueError(f"{len(data):,} bytes")
            size = int.from_bytes(data[:8], "little")
            record = json.loads(json.loads(data[8 : 8 + size])["__metadata__"][_METADATA])
            centroids = safetensors.numpy.load(data)["centroids"]
            found = cls(
                str(record["embedder"]),
                centroids,
                float(record["threshold"]),
                int(record["examples"]),
            )
            if centroids.dtype != np.float32 or centroids.ndim != 2 or not centroids.size:
                raise ValueError(f"centroids of shape {centroids.shape}, {centroids.dtype}")
            if not np.isfinite([*centroids.flat, found.threshold]).all():
                raise ValueError("numbers that are not finite")
        except (
            ValueError,
            KeyError,
            TypeError,
            RecursionError,
            safetensors.SafetensorError,
        ) as error:
            raise StoreError(f"an adapter's embedding in the store is damaged: {error}") from error
        return found


def _centroids(vectors: Vectors) -> Vectors:
    """Spherical k-means from the farthest points; the same vectors give the same centroids."""
    count = max(1, min(CENTROIDS, len(vectors) // 4))
    found = _unit(vectors.mean(0, keepdims=True))
    if count > 1:
        found = vectors[:1]
        for _ in range(count - 1):
            farthest = (vectors @ found.T).max(1).argmin()
            found = np.concatenate([found, vectors[farthest : farthest + 1]])
        for _ in range(10):
            nearest = (vectors @ found.T).argmax(1)
            means = [vectors[nearest == i].mean(0) for i in range(count) if (nearest == i).any()]
            found = _unit(np.stack(means))
            count = len(found)
    return found.astype(np.float32)


def _unit(vectors: Vectors) -> Vectors:
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return (vectors / np.maximum(lengths, 1e-12)).astype(np.float32)
