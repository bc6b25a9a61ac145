"""The command veratune eval."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from jsonargparse import Namespace
from jsonargparse.typing import NonNegativeInt, PositiveInt
from rich.console import Console
from rich.table import Table

from veratune.cli.parsing import Parser, new_parser, parse, print_json
from veratune.errors import ConfigError

if TYPE_CHECKING:
    from veratune.inference.adapted import LoadedModel


def parser() -> Parser:
    out = new_parser(
        "eval", "Score an adapter, and the bare base model beside it, on rows of data."
    )
    add_loading(out)
    out.add_argument(
        "--data",
        type=str | None,
        default=None,
        help="rows: a file, a folder of splits, or a data set id",
    )
    out.add_argument(
        "--harness",
        type=list[str],
        default=[],
        help="tasks of lm-eval instead of --data: names, or YAML files",
    )
    out.add_argument(
        "--limit", type=NonNegativeInt, default=0, help="examples of each harness task; 0: all"
    )
    out.add_argument(
        "--apply-chat-template",
        type=bool,
        default=False,
        help="format the prompts of harness tasks with the chat template",
    )
    out.add_argument(
        "--split", type=str, default="validation", help="split of a folder or data set id"
    )
    out.add_argument(
        "--data-config", type=str | None, default=None, help="configuration of the data set id"
    )
    out.add_argument(
        "--columns",
        type=dict[str, str],
        default={},
        help="the data's column for each role of the task",
    )
    out.add_argument(
        "--batch-size", type=PositiveInt, default=16, help="examples in one forward pass"
    )
    out.add_argument(
        "--generate",
        type=bool,
        default=False,
        help="also answer every row greedily and count exact matches",
    )
    out.add_argument(
        "--max-new-tokens",
        type=PositiveInt,
        default=128,
        help="longest generated answer, in tokens",
    )
    out.add_argument(
        "--base",
        type=bool,
        default=True,
        help="score the bare base model too (classifiers: with an untrained head)",
    )
    out.add_argument("--json", type=bool, default=False, help="print the scores as one JSON object")
    return out


def add_loading(out: Parser) -> None:
    """The flags that say which base model and adapter to load, and how."""
    out.add_argument("--config", type=str, help="YAML file of these settings; flags overrule it")
    out.add_argument(
        "--model", type=str, required=True, help="base model: a folder, a .gguf file, or a hub id"
    )
    out.add_argument(
        "--adapter",
        type=str | None,
        default=None,
        help="adapter file, or the folder of a PEFT VeRA checkpoint",
    )
    out.add_argument(
        "--task",
        type=str | None,
        default=None,
        help="task, if not the one that the adapter's file remembers",
    )
    out.add_argument(
        "--base-dtype",
        type=Literal["float32", "bfloat16", "float16"],
        default="float32",
        help="of the base weights",
    )
    out.add_argument(
        "--quantize",
        type=Literal["4bit", "8bit"] | None,
        default=None,
        help="load the base in 4 or 8 bits",
    )
    out.add_argument(
        "--device",
        type=Literal["auto", "cpu"],
        default="auto",
        help="auto takes a GPU if there is one",
    )
    out.add_argument(
        "--check-base",
        type=bool,
        default=True,
        help="refuse an adapter of a base model with other weights",
    )


def load(flags: Namespace, **more: Any) -> "LoadedModel":
    """Load the model and adapter that the flags of `add_loading` name."""
    from veratune.inference.adapted import load_with_adapter

    return load_with_adapter(
        flags.model,
        flags.adapter,
        task=flags.task,
        dtype=flags.base_dtype,
        quantize=flags.quantize,
        check_base=flags.check_base,
        device=flags.device,
        **more,
    )


def run(argv: Sequence[str]) -> int:
    known = parser()
    flags = parse(known, argv)
    _check(flags, known.get_defaults())
    from veratune.inference.evaluate import evaluate, evaluate_with_base

    loaded = load(flags, columns=flags.columns)
    if flags.harness:
        _show(flags, ", ".join(flags.harness), _harness_scores(flags, loaded))
        return 0
    options = {
        name: getattr(flags, name)
        for name in ("split", "data_config", "batch_size", "generate", "max_new_tokens")
    }
    if flags.adapter is None:
        scores = {"base": evaluate(loaded, flags.data, **options)}
    elif flags.base:
        scores = dict(
            zip(("base", "adapter"), evaluate_with_base(loaded, flags.data, **options), strict=True)
        )
    else:
        scores = {"adapter": evaluate(loaded, flags.data, **options)}
    _show(flags, flags.data, scores)
    return 0


def _check(flags: Namespace, defaults: Namespace) -> None:
    """Refuse flags that what is scored does not read."""
    if bool(flags.harness) == (flags.data is not None):
        raise ConfigError("give either --data or --harness")
    names = (
        ("split", "data_config", "columns", "generate", "max_new_tokens")
        if flags.harness
        else ("limit", "apply_chat_template")
    )
    for name in names:
        if flags[name] != defaults[name]:
            kind = "--harness" if flags.harness else "--data"
            flag = f"--{name.replace('_', '-')}"
            raise ConfigError(f"{flag} is set, but {kind} does not read it; leave it out")


def _harness_scores(flags: Namespace, loaded: "LoadedModel") -> dict[str, dict[str, float]]:
    """The harness' scores of the base model and of the adapter, as the flags ask for them."""
    from veratune.inference.adapted import ADAPTER_NAME
    from veratune.inference.harness import run_harness
    from veratune.selection import use

    options = {
        name: getattr(flags, name) for name in ("batch_size", "limit", "apply_chat_template")
    }
    scores = {}
    if flags.adapter is None or flags.base:
        if flags.adapter is not None:
            use(loaded.model, None)
        scores["base"] = run_harness(loaded, flags.harness, **options)
    if flags.adapter is not None:
        use(loaded.model, ADAPTER_NAME)
        scores["adapter"] = run_harness(loaded, flags.harness, **options)
    return scores


def _show(flags: Namespace, title: str, scores: dict[str, dict[str, float]]) -> None:
    """Print scores as JSON or as a table."""
    if flags.json:
        print_json(scores)
        return
    table = Table(title=title, title_justify="left")
    table.add_column("score")
    for who in scores:
        table.add_column(who, justify="right")
    for name in next(iter(scores.values())):
        table.add_row(name, *(f"{found[name]:.4f}" for found in scores.values()))
    Console(highlight=False).print(table)
