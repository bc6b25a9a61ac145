"""The command veratune import."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from jsonargparse import Namespace
from jsonargparse.typing import NonNegativeInt, PositiveInt

from veratune.cli.parsing import Parser, new_parser, parse
from veratune.errors import AdapterFileError, ConfigError

if TYPE_CHECKING:
    from veratune.adapter import Adapter


def parser() -> Parser:
    out = new_parser(
        "import",
        "Convert a PEFT VeRA checkpoint, a LoRA or a fine-tuned model into an adapter file. "
        "The vectors are fitted to a LoRA or a fine-tuned model by least squares.",
    )
    out.add_argument(
        "source",
        type=str,
        help="a PEFT folder (VeRA or LoRA), a LoRA file, or an adapter file (checked and copied); "
        "with --from-delta a fine-tuned model's folder",
    )
    out.add_argument(
        "--model",
        type=str | None,
        default=None,
        help="the base model's config.json, folder or id. Default: the checkpoint's own",
    )
    out.add_argument(
        "--from-delta",
        type=bool,
        default=False,
        help="fit the difference of the weights of SOURCE and of --model, both folders",
    )
    out.add_argument("--rank", type=PositiveInt, default=256, help="rank of a fitted adapter")
    out.add_argument(
        "--seed", type=NonNegativeInt, default=0, help="basis seed of a fitted adapter"
    )
    out.add_argument(
        "--basis",
        type=Literal["random", "monarch", "peft"],
        default="random",
        help="basis of a fitted adapter",
    )
    out.add_argument(
        "--targets",
        type=list[str] | None,
        default=None,
        help="layers to fit with --from-delta. Default: query and value",
    )
    out.add_argument("--out", type=str, required=True, help="adapter file to write")
    return out


def run(argv: Sequence[str]) -> int:
    flags = parse(parser(), argv)
    from veratune.formats import native, peft

    source = Path(flags.source)
    if flags.from_delta:
        adapter = _fit_delta(flags)
    elif source.is_dir() and _kind(source) == "VERA":
        from veratune.cli.base_models import empty_base

        adapter = peft.read(source, empty_base(flags.model or _base_of(source)))
    elif source.is_dir() or not _is_native(source):
        adapter = _fit_lora(flags)
    else:
        adapter = native.read(source)
    size = native.write(adapter, flags.out)
    print(
        f"{flags.out}: {len(adapter.shapes)} layers, {adapter.trained_values:,} values, {size:,} "
        "bytes"
    )
    return 0


def _fit_lora(flags: Namespace) -> "Adapter":
    """The adapter that is closest to a LoRA; prints the error."""
    from veratune.analysis.fit import differences_of_lora, fit_adapter
    from veratune.cli.base_models import empty_base
    from veratune.cli.export_ import print_errors
    from veratune.config import VeraConfig
    from veratune.formats.lora import read_lora

    source = Path(flags.source)
    if flags.model is None and not source.is_dir():
        raise ConfigError(f"{source}: a LoRA file does not name its base model; give --model")
    model = empty_base(flags.model or _base_of(source))
    config = VeraConfig(rank=flags.rank, seed=flags.seed, basis=flags.basis)
    adapter, errors = fit_adapter(differences_of_lora(read_lora(source, model)), model, config)
    print_errors(errors)
    return adapter


def _fit_delta(flags: Namespace) -> "Adapter":
    """The adapter that is closest to the difference of two models; prints the error."""
    from veratune.analysis.fit import difference_of_weights, fit_adapter
    from veratune.cli.base_models import empty_base
    from veratune.cli.export_ import print_errors
    from veratune.config import VeraConfig
    from veratune.formats.delta import weight_differences

    if flags.model is None:
        raise ConfigError("--from-delta needs --model, the folder of the base model")
    model = empty_base(flags.model)
    config = VeraConfig(
        rank=flags.rank, seed=flags.seed, basis=flags.basis, targets=flags.targets, fused="whole"
    )
    weights = weight_differences(model, config, Path(flags.model), Path(flags.source))
    differences = {layer: difference_of_weights(*pair) for layer, pair in weights.items()}
    adapter, errors = fit_adapter(differences, model, config)
    print_errors(errors)
    return adapter


def _kind(folder: Path) -> str:
    from veratune.formats.peft_files import read_settings

    try:
        return str(read_settings(folder).get("peft_type"))
    except AdapterFileError as error:
        raise AdapterFileError(f"{folder}: {error}") from None


def _is_native(file: Path) -> bool:
    """Whether a file is veratune's own; a damaged one counts, so that its error is told."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as opened:
            return "veratune" in (opened.metadata() or {}) or not any(
                "lora" in key
                for key in opened.keys()  # noqa: SIM118
            )
    except (OSError, SafetensorError):
        return True


def _base_of(folder: Path) -> str:
    from veratune.formats.peft_files import read_settings

    try:
        named = read_settings(folder).get("base_model_name_or_path")
    except AdapterFileError as error:
        raise AdapterFileError(f"{folder}: {error}") from None
    if not named:
        raise AdapterFileError(
            f"{folder}: the checkpoint does not name its base model; give --model"
        )
    return str(named)
