"""The command veratune chat."""

import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from jsonargparse import Namespace
from jsonargparse.typing import NonNegativeFloat, PositiveInt

from veratune.cli.eval_ import add_loading, load
from veratune.cli.parsing import Parser, new_parser, parse
from veratune.errors import ConfigError, DataError

if TYPE_CHECKING:
    from veratune.inference.adapted import LoadedModel

HELP = "/base switches the adapter off and on, /new starts over, /quit ends"


def parser() -> Parser:
    out = new_parser("chat", f"Talk to a base model with an adapter. In the conversation: {HELP}.")
    add_loading(out)
    out.add_argument(
        "--prompt", type=str | None, default=None, help="answer this one message and end"
    )
    out.add_argument(
        "--image",
        type=list[str],
        default=[],
        help="image files of the first message (task image-text-to-text)",
    )
    out.add_argument(
        "--system",
        type=str | None,
        default=None,
        help="system message, if not the one that the adapter remembers",
    )
    out.add_argument(
        "--max-new-tokens", type=PositiveInt, default=512, help="longest answer, in tokens"
    )
    out.add_argument(
        "--temperature",
        type=NonNegativeFloat,
        default=0.0,
        help="randomness of the answers; 0 is greedy",
    )
    return out


def run(argv: Sequence[str]) -> int:
    flags = parse(parser(), argv)
    if flags.temperature < 0:
        raise ConfigError(f"temperature is {flags.temperature}; it must be at least 0")
    from veratune.inference.adapted import ADAPTER_NAME
    from veratune.model_state import active
    from veratune.selection import use

    loaded = load(flags)
    reply = _replier(flags, loaded)
    conversation: list[dict[str, Any]] = []
    if flags.prompt is not None:
        reply(conversation, flags.prompt)
        return 0
    print(HELP, file=sys.stderr)
    while True:
        try:
            text = input("> ").strip()
        except EOFError:
            return 0
        if text == "/quit":
            return 0
        if text == "/new":
            conversation.clear()
        elif text == "/base":
            if flags.adapter is None:
                print("there is no adapter: this is the base model", file=sys.stderr)
                continue
            use(loaded.model, None if active(loaded.model) else ADAPTER_NAME)
            print(
                "adapter on" if active(loaded.model) else "adapter off: the bare base model",
                file=sys.stderr,
            )
        elif text.startswith("/"):
            print(f"unknown command {text!r}: {HELP}", file=sys.stderr)
        elif text:
            reply(conversation, text)


def _replier(
    flags: Namespace, loaded: "LoadedModel"
) -> Callable[[list[dict[str, Any]], str], None]:
    """Return a function that adds a message and the model's reply to a conversation."""
    from veratune.inference.generate import stream_completion
    from veratune.inference.multimodal import stream_with_images
    from veratune.tasks.multimodal.image_text import ImageTextToText
    from veratune.tasks.text.grpo import Grpo
    from veratune.tasks.text.language import Instruction
    from veratune.tasks.text.preference import Preference

    task = loaded.task
    if not isinstance(task, Instruction | Preference | Grpo | ImageTextToText):
        raise ConfigError(
            f"the adapter was trained for {task.name}, which does not converse; pass --task "
            "instruction to insist"
        )
    if flags.image and not isinstance(task, ImageTextToText):
        raise ConfigError(f"--image is set, but task {task.name!r} sees no images; leave it out")
    if flags.system is not None:
        task.system = flags.system
    images = _images(flags.image)
    options = {"max_new_tokens": flags.max_new_tokens, "temperature": flags.temperature}

    def reply(conversation: list[dict[str, Any]], text: str) -> None:
        shown = [{"type": "image"}] * len(images) * (not conversation)
        content = [*shown, {"type": "text", "text": text}] if shown else text
        conversation.append({"role": "user", "content": content})
        messages = task.with_system(conversation)
        if isinstance(task, ImageTextToText):
            answer = stream_with_images(loaded.model, loaded.processor, messages, images, **options)
        else:
            answer = stream_completion(loaded.model, loaded.processor, messages, **options)
        conversation.append({"role": "assistant", "content": answer})

    return reply


def _images(paths: Sequence[str]) -> list[dict[str, Any]]:
    """Image files as data sets store them, each decoded once."""
    from veratune.tasks.multimodal.image_encoding import MAX_PIXELS
    from veratune.tasks.multimodal.image_rows import MAX_BYTES
    from veratune.tasks.multimodal.media import media_of
    from veratune.tasks.vision.images import read_image

    images = []
    for path in paths:
        try:
            images.append(media_of(path, "", MAX_BYTES, allow_urls=False))
            read_image(images[-1], MAX_PIXELS)
        except ValueError as error:
            raise DataError(f"--image {path}: {error}") from None
    return images
