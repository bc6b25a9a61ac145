"""veratune: find the command, run it, and end with 0 (done), 1 (a mistake in data or files) or 2 (in the command line)."""

import importlib
import logging
import os
import sys
import warnings
from collections.abc import Callable, Sequence

from jsonargparse import ArgumentError

from veratune import __version__
from veratune.cli.parsing import UsageError
from veratune.errors import ConfigError, VeratuneError, near

COMMANDS = {
    "train": "fine-tune a model with VeRA",
    "train-fleet": "fine-tune one adapter per tenant, many tenants in each batch",
    "eval": "score an adapter on rows of data",
    "chat": "talk to a base model with an adapter",
    "sample": "draw with a diffusion pipeline and an adapter",
    "count": "parameters, bytes and memory, from a configuration alone",
    "inspect": "what is in an adapter's file",
    "merge": "write the merged model",
    "export": "write an adapter for other tools",
    "import": "read an adapter of other tools",
    "score": "BLEU, NIST, METEOR, ROUGE-L and CIDEr of texts against references",
    "judge": "what a judge behind an OpenAI-compatible URL gives to answers",
    "serve": "many adapters behind an OpenAI-compatible API",
    "key": "a key for the server",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print(overview())
        return 0 if words else 2
    if words[0] in ("-V", "--version"):
        print(f"veratune {__version__}")
        return 0
    name, rest = words[0], words[1:]
    if name not in COMMANDS:
        return _fail(
            f"unknown command {name!r}{near(name, COMMANDS) or '; see veratune --help'}", 2
        )
    module = f"veratune.cli.{name.replace('-', '_')}_"
    return run_command(name, lambda words: importlib.import_module(module).run(words), rest)


def run_command(name: str, run: Callable[[Sequence[str]], int | None], rest: Sequence[str]) -> int:
    """Call run(rest). Every VeratuneError becomes one line on stderr and an exit status."""
    quiet()
    try:
        return run(rest) or 0
    except (UsageError, ArgumentError) as error:
        return _fail(f"{error} (see veratune {name} --help)", 2)
    except ConfigError as error:
        return _fail(str(error), 2)
    except VeratuneError as error:
        return _fail(str(error), 1)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in ("veratune", ""):
            raise
        return _fail(
            f"{name} needs the package {error.name!r}: pip install 'veratune[train,vision,plot,peft,quantized,scores,serve,cluster]'",
            1,
        )
    except KeyboardInterrupt:
        return _fail("interrupted; a training run goes on with --resume", 130)
    except BrokenPipeError:  # the reader of our output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def overview() -> str:
    """The list of commands."""
    lines = [f"  {name:<11} {text}" for name, text in COMMANDS.items()]
    return "\n".join(
        ["usage: veratune COMMAND [FLAGS]", "", "VeRA fine-tuning: a model of your own in kilobytes.", "", *lines, "",
         "veratune COMMAND --help lists the flags of a command, with units and defaults."]
    )  # fmt: skip


def quiet() -> None:
    """What the libraries below say while loading is not the user's business."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # torch's profiler
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"(?!veratune)")
    warnings.showwarning = lambda message, *rest: print(f"warning: {message}", file=sys.stderr)


def _fail(message: str, status: int) -> int:
    print(f"veratune: {message}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
