"""TrainResult: what a training run returns, and the memory it took."""

import dataclasses
import resource
import sys

import torch


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """The result of one training run.

    Attributes:
        path: The adapter file.
        bytes: Its size.
        trained: Trained values in d and b, or in what else the method trains beside the head.
        head: Trained values in the head.
        before: Evaluation scores before training; empty without evaluation data.
        after: Evaluation scores after training.
        loss: Mean training loss of the run, or of its resumed part.
        steps: Optimizer steps.
        seconds: Duration of training.
        peak_memory: Most bytes that the process, or on a GPU the GPU, has held.
    """

    path: str
    bytes: int
    trained: int
    head: int
    before: dict[str, float]
    after: dict[str, float]
    loss: float
    steps: int
    seconds: float
    peak_memory: int


def peak_memory() -> int:
    """Most bytes that this process, or on a GPU the GPU, has held."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
