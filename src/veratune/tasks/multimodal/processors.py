"""Processors of vision-language models: a tokenizer, an image processor and a chat template."""

import functools
from typing import Any

from transformers import PROCESSOR_MAPPING, AutoConfig, AutoProcessor, ProcessorMixin
from transformers.utils.import_utils import is_torchvision_available

from veratune.errors import DataError
from veratune.loading import loading_errors


def load_image_text_processor(model: str) -> ProcessorMixin:
    """Load a vision-language model's processor.

    Args:
        model: The model's folder or hub id.

    Returns:
        The processor. Without torchvision it has no video processor.

    Raises:
        DataError: It cannot be loaded, or the model's processor takes no images.
    """
    with loading_errors(model):
        kind: Any = PROCESSOR_MAPPING.get(type(AutoConfig.from_pretrained(model)), AutoProcessor)
        if not is_torchvision_available() and kind is not AutoProcessor:
            kind = without_video(kind)
        processor = kind.from_pretrained(model)
    if not isinstance(processor, ProcessorMixin) or not hasattr(processor, "image_processor"):
        raise DataError(
            f"base model {model!r} has no processor of images and text; give a vision-language "
            "model"
        )
    tokenizer: Any = processor.tokenizer
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return processor


@functools.cache
def without_video(kind: type[ProcessorMixin]) -> type[ProcessorMixin]:
    """A processor class without its video processor, which transformers 5.23 cannot even build
    without torchvision; the class itself where it has none.
    """
    if "video_processor" not in kind.get_attributes():
        return kind

    class ImagesOnly(kind):  # type: ignore[valid-type, misc]
        @classmethod
        def get_attributes(cls) -> list[str]:
            return [name for name in super().get_attributes() if name != "video_processor"]

        @classmethod
        def from_args_and_dict(cls, args: list[Any], *more: Any, **options: Any) -> Any:
            # The third argument of these classes is the video processor.
            return super().from_args_and_dict([*args, None], *more, **options)

    ImagesOnly.__name__ = ImagesOnly.__qualname__ = kind.__name__  # saved files name this class
    return ImagesOnly
