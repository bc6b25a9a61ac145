"""Parse command lines with jsonargparse: YAML settings first, then flags.

A flag is written with hyphens (underscores work too); a true-or-false flag may stand alone; a list
may be written a,b,c. YAML keys keep underscores, as the Python fields that they set.
"""

import dataclasses
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import yaml
from jsonargparse import ArgumentParser, DefaultHelpFormatter, Namespace

from veratune.errors import ConfigError, near

T = TypeVar("T")

# Flags whose value may be a comma-separated list.
LISTS = (
    "targets",
    "exclude",
    "layers",
    "head",
    "report_to",
    "prompts",
    "reward",
    "ignore_columns",
    "harness",
    "tenants",
    "adapters",
    "adapter_sources",
    "image",
    "reward_weights",
    "cors_origins",
    "allowed_hosts",
)

# Flags of PEFT, TRL and other trainers, and what they are called here.
ALIASES = {
    "adapter": "start-adapter",
    "base-model": "model",
    "bf16": "mixed-precision bf16",
    "dataset": "data",
    "dataset-name": "data",
    "eval-dataset": "eval-data",
    "fp16": "mixed-precision fp16",
    "group-by-len": "group-by-length",
    "learning-rate": "lr",
    "load-in-4bit": "quantize",
    "lora-dropout": "dropout",
    "lora-r": "rank",
    "lora-target-modules": "targets",
    "lr-scheduler-type": "lr-scheduler",
    "max-seq-length": "max-length",
    "model-name": "model",
    "model-name-or-path": "model",
    "num-epochs": "epochs",
    "num-train-epochs": "epochs",
    "output": "out",
    "output-dir": "out",
    "per-device-train-batch-size": "batch-size",
    "precision": "mixed-precision",
    "r": "rank",
    "resume-from-checkpoint": "resume",
    "sample-packing": "packing",
    "target-modules": "targets",
    "train-batch-size": "batch-size",
    "train-file": "data",
    "vera-dropout": "dropout",
}
# Programs that read a format of another name.
FORMATS = {
    "comfyui": "kohya",
    "llama.cpp": "gguf-lora",
    "llamacpp": "gguf-lora",
    "lora": "peft-lora",
    "mlx": "mlx-lm",
    "ollama": "gguf-lora",
}

# Measured settings by name; docs/recipes.md says on what they were measured.
RECIPES = {path.stem: path for path in sorted((Path(__file__).parent / "recipes").glob("*.yaml"))}


class UsageError(Exception):
    """A command line that cannot be parsed: exit status 2."""


class Parser(ArgumentParser):
    """jsonargparse's parser with hyphenated flags and one-line errors."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:  # type: ignore[override]
        """Raise UsageError instead of printing the usage and exiting."""
        raise UsageError(self._one_line(message))

    def parse_args(self, *args: Any, **kwargs: Any) -> Any:
        """Parse with hyphenated flags."""
        self._hyphenate()
        return super().parse_args(*args, **kwargs)

    def format_help(self, *args: Any, **kwargs: Any) -> str:
        """Show hyphenated flags."""
        self._hyphenate()
        return super().format_help(*args, **kwargs)

    def flags(self) -> set[str]:
        """The names of all flags, hyphenated and without the leading dashes."""
        options = [o for action in self._actions for o in action.option_strings]
        return {option[2:].replace("_", "-") for option in options if option.startswith("--")}

    def keys(self) -> set[str]:
        """The keys that a YAML file may set: the flags' names with underscores."""
        return {flag.replace("-", "_") for flag in self.flags()} - {"help", "config"}

    def booleans(self) -> set[str]:
        """The keys of true-or-false flags."""
        return {a.dest for a in self._actions if getattr(a, "_typehint", None) is bool}

    def _hyphenate(self) -> None:
        # jsonargparse names a dataclass's flags after its fields and has no setting for hyphens.
        for action in self._actions:
            action.option_strings = [_hyphenated(option) for option in action.option_strings]
            self._option_string_actions.update(dict.fromkeys(action.option_strings, action))

    def _one_line(self, message: str) -> str:
        unknown = re.search(r"[Uu]nrecognized arguments:? (\S+)", message)
        if unknown:
            flag = unknown.group(1)
            alias = ALIASES.get(flag.lstrip("-").replace("_", "-"), "")
            if alias.partition(" ")[0] in self.flags():
                return f"unknown flag {flag!r}; here it is --{alias}"
            return f"unknown flag {flag!r}{near(flag, [f'--{name}' for name in self.flags()])}"
        line = " ".join(message.split())
        # Of an optional value, only the error about the value itself is useful.
        line = re.sub(
            r"Does not validate against any of the Union .*? Errors: - (.*?)"
            r" - Expected a <class 'NoneType'> Given value type: .*? Given value: (.*)",
            lambda found: (
                found[1] + ("" if "Got value" in found[1] else f". Got value: {found[2]}")
            ),
            line,
        )
        line = re.sub(
            r"Expected a typing\.Literal\[(.*?)\]\. Got value: (.*)",
            lambda found: _no_choice(found[2], re.findall(r"'([^']*)'", found[1])),
            line,
        )
        return re.sub(
            r'^Parser key "(\w+)": ', lambda key: f"{_hyphenated('--' + key.group(1))}: ", line
        )


def new_parser(name: str, description: str, prog: str = "veratune") -> Parser:
    """An empty parser for one command.

    Args:
        name: The command.
        description: One or two sentences, shown by --help.
        prog: The program that the command belongs to, as users type it.
    """
    return Parser(
        prog=f"{prog} {name}".rstrip(),
        description=description,
        formatter_class=DefaultHelpFormatter,
        default_env=False,
    )


def add_recipe(parser: Parser) -> None:
    """Add --recipe."""
    parser.add_argument(
        "--recipe",
        type=str | None,
        default=None,
        help=f"settings by name: {', '.join(RECIPES)}; --config and flags overrule them",
    )


def add_json(parser: Parser, printed: str = "the result") -> None:
    """Add --json."""
    parser.add_argument(
        "--json", type=bool, default=False, help=f"print {printed} as JSON, not as a table"
    )


def add_judge(parser: Parser) -> None:
    """Add the flags that configure an LLM judge."""
    parser.add_argument(
        "--judge-url",
        type=str | None,
        default=None,
        help="OpenAI-compatible API of the judge, such as https://api.openai.com/v1; "
        "without it, only cached ratings are used",
    )
    parser.add_argument("--judge-model", type=str, default="gpt-4", help="the judge's model name")
    parser.add_argument(
        "--judge-key",
        type=str,
        default="OPENAI_API_KEY",
        help="environment variable that holds the judge's API key",
    )


def parse(parser: Parser, argv: Sequence[str]) -> Namespace:
    """Parse flags; the keys of --config FILE and of --recipe NAME apply first, so that flags win.

    Raises:
        UsageError: The command line cannot be parsed.
        ConfigError: The file cannot be read or has an unknown key; names the nearest known key.
    """
    words = _normalize(parser, argv)
    flags = [word for word in words if word.startswith("--") and word != "--"]
    twice = next((word for word in flags if flags.count(word) > 1), None)
    if twice is not None:
        raise UsageError(f"{twice} is given twice; a list is written a,b or a b")
    if "--config" in words:
        at = words.index("--config")
        if at + 1 >= len(words):
            raise UsageError("--config wants the name of a YAML file")
        words = _words_of_file(parser, words[at + 1]) + words[:at] + words[at + 2 :]
    if "--recipe" in words and "recipe" in parser.flags():
        at = words.index("--recipe")
        name = words[at + 1] if at + 1 < len(words) else ""
        if name not in RECIPES:
            raise UsageError(
                f"no recipe {name!r}; there are {', '.join(RECIPES)}{near(name, RECIPES)}"
            )
        words = _words_of_file(parser, str(RECIPES[name])) + words
    found = parser.parse_args(words)
    for name, value in found.items():
        # jsonargparse makes the classes of bounded numbers at run time; they cannot be pickled for
        # another process.
        plain = next((kind for kind in (bool, int, float) if isinstance(value, kind)), None)
        found[name] = plain(value) if plain is not None else value
    return found


def split(flags: Namespace, kind: type[T]) -> T:
    """Build the dataclass `kind` from a namespace that may hold more than its fields."""
    names = {field.name for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    values = {key: value for key, value in vars(flags).items() if key in names}
    return kind(**{k: vars(v) if isinstance(v, Namespace) else v for k, v in values.items()})


def print_json(value: object) -> None:
    """Print a value as JSON on standard output."""
    json.dump(value, sys.stdout, indent=2)
    sys.stdout.write("\n")


def _no_choice(value: str, known: Sequence[str]) -> str:
    """The end of a message about a value that is none of the known ones."""
    hint = near(value, known)
    if FORMATS.get(value.lower()) in known:
        hint = f"; for {value} it is {FORMATS[value.lower()]}"
    return f"{value!r} is none of {', '.join(known)}{hint}"


def _normalize(parser: Parser, argv: Sequence[str]) -> list[str]:
    """Hyphenate flags, split --flag=value, write true after a lone boolean flag, lists as JSON."""
    words: list[str] = []
    booleans = parser.booleans()
    # Commands with arguments of their own: these could not be told from a list's further values.
    one_value = any(not action.option_strings for action in parser._actions)
    given = [part for word in argv for part in _parts(word)]
    flag: str | None = None
    values = 0  # since that flag
    for i, word in enumerate(given):
        if word.startswith("--"):
            flag, values = _key(word), 0
            words.append(word)
            if flag in booleans and (i + 1 == len(given) or given[i + 1].startswith("--")):
                words.append("true")
            continue
        values += 1
        if flag not in LISTS or (values > 1 and (one_value or words[-1] == "null")):
            words.append(word)
        elif values == 1:
            words.append(_list(word))
        else:
            words[-1] = json.dumps([*yaml.safe_load(words[-1]), *yaml.safe_load(_list(word))])
    return words


def _parts(word: str) -> list[str]:
    """Split and hyphenate --flag=value. Values and the part after a dot stay."""
    if not word.startswith("--") or word == "--":
        return [word]
    flag, equals, value = word.partition("=")
    head, dot, tail = flag.partition(".")
    return [_hyphenated(head) + dot + tail, *([value] if equals else [])]


def _hyphenated(option: str) -> str:
    return option.replace("_", "-")


def _key(word: str) -> str | None:
    """The YAML key of a flag; None for a value."""
    return word[2:].replace("-", "_") if word.startswith("--") else None


def _list(text: str) -> str:
    """A list as JSON. A regular expression may contain commas, so it is one entry."""
    if text.startswith("[") and text.endswith("]"):
        return text
    if text in ("null", "None"):
        return "null"
    entries = [text] if text.startswith("re:") else [part for part in text.split(",") if part]
    return json.dumps([int(entry) if entry.isdigit() else entry for entry in entries])


def _words_of_file(parser: Parser, name: str) -> list[str]:
    """The settings of a YAML file as a command line."""
    try:
        settings = yaml.safe_load(Path(name).read_text())
    except OSError as error:
        raise ConfigError(f"{name}: cannot be read: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{name}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(settings, Mapping):
        raise ConfigError(f"{name}: a mapping of settings is wanted, not {type(settings).__name__}")
    known = parser.keys()
    words = []
    for key, value in settings.items():
        if key not in known:
            hint = near(str(key), known) or "; see veratune --help for the known ones"
            raise ConfigError(f"{name}: unknown key {key!r}{hint}")
        if key in LISTS and isinstance(value, str):
            value = json.loads(_list(value))
        words += [_hyphenated(f"--{key}"), value if isinstance(value, str) else json.dumps(value)]
    return words
