"""The command veratune sample."""

from collections.abc import Sequence
from pathlib import Path

from jsonargparse.typing import PositiveInt

from veratune.cli.eval_ import add_loading, load
from veratune.cli.parsing import Parser, new_parser, parse
from veratune.errors import ConfigError


def parser() -> Parser:
    out = new_parser(
        "sample",
        "Draw images with a diffusion pipeline and an adapter, and with the bare pipeline from the "
        "same noise.",
    )
    add_loading(out)
    out.add_argument(
        "--prompts",
        type=list[str],
        default=[],
        help="what to draw; default the prompts that the adapter's file remembers",
    )
    out.add_argument("--count", type=PositiveInt, default=4, help="images for each prompt")
    out.add_argument("--steps", type=PositiveInt, default=25, help="denoising steps")
    out.add_argument("--seed", type=int, default=0, help="of the noise")
    out.add_argument("--base", type=bool, default=True, help="draw with the bare pipeline too")
    out.add_argument("--out", type=str, default="samples.png", help="the picture to write")
    return out


def run(argv: Sequence[str]) -> int:
    flags = parse(parser(), argv)
    if flags.count < 1 or flags.steps < 1:
        raise ConfigError(
            f"count is {flags.count} and steps {flags.steps}; both must be at least 1"
        )
    from veratune.analysis.pictures import draw_grid
    from veratune.inference.adapted import ADAPTER_NAME
    from veratune.selection import use
    from veratune.tasks.diffusion.generation import ImageGeneration
    from veratune.tasks.diffusion.models import Diffusion

    loaded = load(flags)
    if not isinstance(loaded.task, ImageGeneration) or not isinstance(loaded.model, Diffusion):
        raise ConfigError(
            f"sample draws images, but the adapter's task is {loaded.task.name!r}; give --task "
            "text-to-image or another adapter"
        )
    prompts = flags.prompts or loaded.task.prompts
    if loaded.task.name == "text-to-image" and not prompts:
        raise ConfigError("no prompt; say what to draw with --prompts")
    rows = {}
    for who in (["base"] if flags.base or flags.adapter is None else []) + (
        ["adapter"] if flags.adapter else []
    ):
        if flags.adapter:
            use(loaded.model, ADAPTER_NAME if who == "adapter" else None)
        lists = loaded.model.draw(
            flags.count, prompts, flags.seed, flags.steps, loaded.processor.side
        )
        for prompt, images in zip(prompts or [""], lists, strict=True):
            rows[f"{who}: {prompt}".removesuffix(": ")] = images
    path = draw_grid(rows, Path(flags.out), zoom=max(1, 64 // loaded.processor.side))
    print(f"{path}: {sum(map(len, rows.values()))} images")
    return 0
