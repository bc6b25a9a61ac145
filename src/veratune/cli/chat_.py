"""The command veratune chat."""

import sys
from collections.abc import Sequence

from jsonargparse.typing import NonNegativeFloat, PositiveInt

from veratune.cli.eval_ import add_loading, load
from veratune.cli.parsing import Parser, new_parser, parse
from veratune.errors import ConfigError

HELP = "/base switches the adapter off and on, /new starts over, /quit ends"


def parser() -> Parser:
    out = new_parser("chat", f"Talk to a base model with an adapter. In the conversation: {HELP}.")
    add_loading(out)
    out.add_argument(
        "--prompt", type=str | None, default=None, help="answer this one message and end"
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
    from veratune.inference.generate import stream_completion
    from veratune.model_state import active
    from veratune.selection import use
    from veratune.tasks.text.grpo import Grpo
    from veratune.tasks.text.language import Instruction
    from veratune.tasks.text.preference import Preference

    loaded = load(flags)
    if not isinstance(loaded.task, Instruction | Preference | Grpo):
        raise ConfigError(
            f"the adapter was trained for {loaded.task.name}, which does not converse; pass --task "
            "instruction to insist"
        )
    if flags.system is not None:
        loaded.task.system = flags.system
    conversation: list[dict[str, str]] = []

    def reply(text: str) -> None:
        conversation.append({"role": "user", "content": text})
        answer = stream_completion(
            loaded.model,
            loaded.processor,
            loaded.task.with_system(conversation),  # type: ignore[attr-defined]
            max_new_tokens=flags.max_new_tokens,
            temperature=flags.temperature,
        )
        conversation.append({"role": "assistant", "content": answer})

    if flags.prompt is not None:
        reply(flags.prompt)
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
            reply(text)
