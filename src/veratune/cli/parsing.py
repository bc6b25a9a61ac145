"""Command lines to settings: jsonargparse, a YAML file before the flags, and near names for mistakes.

A flag may be written with - or _; true-or-false flags may stand alone; lists may be written a,b,c.
"""

import dataclasses
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import ArgumentParser, DefaultHelpFormatter, Namespace

from veratune.errors import ConfigError, near

LISTS = ("targets", "exclude", "layers", "head", "report_to", "prompts", "tenants", "adapters")


# Settings that were measured to do well, by name; docs/recipes.md says on what.
RECIPES = {path.stem: path for path in sorted((Path(__file__).parent / "recipes").glob("*.yaml"))}


class Usage(Exception):
    """A command line that cannot be understood: exit status 2."""


class Parser(ArgumentParser):
    """jsonargparse's parser; a mistake is one line that names the nearest known flag."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:  # type: ignore[override]
        raise Usage(self._one_line(message))

    def _one_line(self, message: str) -> str:
        known = self.flags()
        unknown = re.search(r"[Uu]nrecognized arguments:? (\S+)", message)
        if unknown:
            return f"unknown flag {unknown.group(1)!r}{near(unknown.group(1), [f'--{k}' for k in known])}"
        line = " ".join(message.split())
        # Of an optional value only what is wrong with it as a value is of interest.
        line = re.sub(
            r"Does not validate against any of the Union .*? Errors: - (.*?) - Expected a <class 'NoneType'> Given .*",
            r"\1",
            line,
        )
        return re.sub(r'^Parser key "(\w+)": ', r"--\1: ", line)

    def flags(self) -> set[str]:
        """The names of all flags, without their dashes."""
        return {
            o[2:] for action in self._actions for o in action.option_strings if o.startswith("--")
        }

    def booleans(self) -> set[str]:
        return {a.dest for a in self._actions if getattr(a, "_typehint", None) is bool}


def new_parser(name: str, description: str) -> Parser:
    """An empty parser of one command, with --config if it takes a file."""
    return Parser(
        prog=f"veratune {name}",
        description=description,
        formatter_class=DefaultHelpFormatter,
        default_env=False,
    )


def add_judge(parser: Parser) -> None:
    """The flags that say who rates answers."""
    parser.add_argument(
        "--judge_url",
        type=str | None,
        default=None,
        help="an OpenAI-compatible API that rates answers, such as https://api.openai.com/v1; without it the cache alone",
    )
    parser.add_argument("--judge_model", type=str, default="gpt-4", help="the judge's name there")
    parser.add_argument(
        "--judge_key",
        type=str,
        default="OPENAI_API_KEY",
        help="the environment variable that holds the judge's key",
    )


def parse(parser: Parser, argv: Sequence[str]) -> Namespace:
    """Flags to a namespace; the keys of --config FILE go first, so that flags overrule them.

    Raises Usage, or ConfigError naming an unknown key of the file and the nearest known one.
    """
    words = _normal(parser, argv)
    if "--config" in words:
        at = words.index("--config")
        if at + 1 >= len(words):
            raise Usage("--config wants the name of a YAML file")
        words = _from_file(parser, words[at + 1]) + words[:at] + words[at + 2 :]
    if "--recipe" in words and "recipe" in parser.flags():
        at = words.index("--recipe")
        name = words[at + 1] if at + 1 < len(words) else ""
        if name not in RECIPES:
            raise Usage(f"no recipe {name!r}; there are {', '.join(RECIPES)}{near(name, RECIPES)}")
        words = _from_file(parser, str(RECIPES[name])) + words
    # jsonargparse reports some mistakes by exception; main makes all of them one line.
    flags = parser.parse_args(words)
    for name, value in flags.items():
        # Bounded numbers are of classes made at run time, which another process does not know.
        plain = next((kind for kind in (bool, int, float) if isinstance(value, kind)), None)
        flags[name] = plain(value) if plain is not None else value
    return flags


def split(settings: Namespace, kind: type[Any]) -> Any:
    """The dataclass `kind` out of a namespace that may hold more than its fields."""
    names = {f.name for f in dataclasses.fields(kind)}
    found = {k: _plain(v) for k, v in vars(settings).items() if k in names}
    return kind(**found)


def print_json(value: Any) -> None:
    """One JSON object on standard output."""
    json.dump(value, sys.stdout, indent=2)
    sys.stdout.write("\n")


def _plain(value: Any) -> Any:
    return vars(value) if isinstance(value, Namespace) else value


def _normal(parser: Parser, argv: Sequence[str]) -> list[str]:
    words: list[str] = []
    booleans = parser.booleans()
    pending = [w for word in argv for w in _parts(word)]
    for i, word in enumerate(pending):
        words.append(word)
        if (
            word[:2] == "--"
            and word[2:] in booleans
            and (i + 1 == len(pending) or pending[i + 1].startswith("--"))
        ):
            words.append("true")
        elif i and pending[i - 1][2:] in LISTS and pending[i - 1].startswith("--"):
            words[-1] = _list(word)
    return words


def _parts(word: str) -> list[str]:
    """--a-b=c to --a_b c; values are left alone."""
    if not word.startswith("--") or word == "--":
        return [word]
    name, equals, value = word.partition("=")
    head, dot, tail = name.partition(".")
    return [
        head.replace("-", "_").replace("__", "--", 1) + dot + tail,
        *([value] if equals else []),
    ]


def _list(text: str) -> str:
    """A list as JSON; a regular expression may hold commas, so it is one entry."""
    if text.startswith("[") and text.endswith("]"):
        return text
    if text in ("null", "None"):
        return "null"
    entries: list[Any] = (
        [text] if text.startswith("re:") else [part for part in text.split(",") if part]
    )
    return json.dumps([int(e) if isinstance(e, str) and e.isdigit() else e for e in entries])


def _from_file(parser: Parser, name: str) -> list[str]:
    try:
        settings = yaml.safe_load(Path(name).read_text())
    except OSError as error:
        raise ConfigError(f"{name}: cannot be read: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{name}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(settings, Mapping):
        raise ConfigError(f"{name}: a mapping of settings is wanted, not {type(settings).__name__}")
    known = parser.flags() - {"help", "config"}
    words = []
    for key, value in settings.items():
        if key not in known:
            raise ConfigError(
                f"{name}: unknown key {key!r}{near(str(key), known) or '; see veratune --help for the known ones'}"
            )
        if key in LISTS and isinstance(value, str):
            value = json.loads(_list(value))
        words += [f"--{key}", value if isinstance(value, str) else json.dumps(value)]
    return words
