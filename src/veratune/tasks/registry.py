"""Every task by its name."""

from collections.abc import Mapping
from typing import Any

from veratune.errors import AdapterFileError, ConfigError, near
from veratune.tasks.base import TEMPLATE_HASH, Task
from veratune.tasks.diffusion.generation import TextToImage, UnconditionalImage
from veratune.tasks.multimodal.image_text import ImageTextToText
from veratune.tasks.multimodal.speech import SpeechRecognition
from veratune.tasks.text.classification import TextClassification, TextRegression
from veratune.tasks.text.embedding import Embedding, Reranker
from veratune.tasks.text.grpo import Grpo
from veratune.tasks.text.language import CausalLM, Instruction
from veratune.tasks.text.preference import Preference
from veratune.tasks.text.reward import RewardModel
from veratune.tasks.text.seq2seq import Seq2Seq
from veratune.tasks.vision.classification import ImageClassification
from veratune.tasks.vision.detection import ObjectDetection

TASKS: dict[str, type[Task]] = {
    t.name: t
    for t in (
        TextClassification,
        TextRegression,
        Instruction,
        CausalLM,
        Preference,
        RewardModel,
        Grpo,
        Seq2Seq,
        Embedding,
        Reranker,
        ImageClassification,
        ObjectDetection,
        ImageTextToText,
        SpeechRecognition,
        TextToImage,
        UnconditionalImage,
    )
}


def task_class(name: str) -> type[Task]:
    """The class of a task. Raises ConfigError for an unknown name."""
    if name not in TASKS:
        raise ConfigError(f"unknown task {name!r}; there are {', '.join(TASKS)}{near(name, TASKS)}")
    return TASKS[name]


def task_from_metadata(description: Mapping[str, Any]) -> Task:
    """The task that an adapter's file remembers. Raises AdapterFileError if it is none that is
    known here.
    """
    settings = {key: value for key, value in description.items() if key != TEMPLATE_HASH}
    try:
        return task_class(settings.pop("name"))(**settings)
    except (KeyError, TypeError, ConfigError) as error:
        raise AdapterFileError(
            f"the adapter's task {dict(description)!r} is not known here: {error}"
        ) from None
