"""veratune: run one command.

Exit status: 0 done, 1 an error in data or files, 2 an error in the command line or a setting.
"""

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
    "plan": "check a training run: data, memory, time and bytes, without running it",
    "train-fleet": "fine-tune one adapter per tenant, many tenants in each batch",
    "train-feedback": "train tenants' adapters on their feedback, and publish what is better",
    "eval": "score an adapter on a data set",
    "report": "write an HTML page about a training run",
    "chat": "chat with a base model and an adapter",
    "sample": "generate images with a diffusion pipeline and an adapter",
    "count": "parameters, bytes and memory, from a model configuration alone",
    "inspect": "show the layers, norms and settings of an adapter file",
    "merge": "write the merged model",
    "export": "convert an adapter for other tools",
    "import": "convert an adapter of another tool",
    "push": "upload an adapter to the Hugging Face Hub",
    "pull": "download an adapter from the Hugging Face Hub",
    "verify": "check an adapter's digest, basis, base model and signature",
    "sign": "sign an adapter file with an Ed25519 key",
    "score": "BLEU, NIST, METEOR, ROUGE-L and CIDEr of generated texts",
    "judge": "rate answers with an LLM judge",
    "serve": "serve many adapters behind an OpenAI-compatible API",
    "key": "create, list and revoke API keys of the server",
    "calibrate": "measure this machine for plan=auto",
    "explain": "estimate the cost of each plan for a model's layers",
}

EXTRAS = (
    "train,vision,plot,peft,quantized,scores,serve,traces,cluster,exits,post,search,"
    "harness,lightning"
)


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
        hint = near(name, COMMANDS) or "; see veratune --help"
        return _fail(f"unknown command {name!r}{hint}", 2)
    module = f"veratune.cli.{name.replace('-', '_')}_"
    return run_command(
        f"veratune {name}", lambda words: importlib.import_module(module).run(words), rest
    )


def run_command(
    command: str, run: Callable[[Sequence[str]], int | None], argv: Sequence[str]
) -> int:
    """Call run(argv); a VeratuneError becomes one line on stderr and an exit status.

    Args:
        command: The command as users type it, for the hint at its --help.
        run: Runs the command. None counts as exit status 0.
        argv: The command's arguments.
    """
    quiet()
    try:
        return run(argv) or 0
    except (UsageError, ArgumentError) as error:
        return _fail(f"{error} (see {command} --help)", 2)
    except ConfigError as error:
        return _fail(str(error), 2)
    except VeratuneError as error:
        return _fail(str(error), 1)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in ("veratune", "veratune_lab", ""):
            raise
        return _fail(
            f"{command} needs the package {error.name!r}: pip install 'veratune[{EXTRAS}]'", 1
        )
    except KeyboardInterrupt:
        return _fail("interrupted; --resume goes on from a training run's last checkpoint", 130)
    except BrokenPipeError:  # the reader of our output has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        if error.filename is None:
            raise
        return _fail(f"{error.filename}: {error.strerror}", 1)


def overview() -> str:
    """The list of commands, as veratune --help prints it."""
    width = max(map(len, COMMANDS)) + 2
    return "\n".join(
        [
            "usage: veratune COMMAND [FLAGS]",
            "",
            "Fine-tune any PyTorch model with VeRA, and serve the adapters.",
            "",
            *(f"  {name:<{width}}{text}" for name, text in COMMANDS.items()),
            "",
            "veratune COMMAND --help lists the flags of a command, with units and defaults.",
        ]
    )


def quiet() -> None:
    """Silence progress bars and advice of the libraries below; their warnings are not ours."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DATASETS_VERBOSITY", "critical")
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
