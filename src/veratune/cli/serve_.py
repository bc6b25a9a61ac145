"""The command veratune serve."""

from collections.abc import Sequence

from veratune.cli.parsing import Parser, new_parser, parse, split
from veratune.serving.config import ServeConfig


def parser() -> Parser:
    """The flags: the settings of ServeConfig."""
    out = new_parser(
        "serve",
        "Serve a base model with the adapters of many tenants behind an OpenAI-compatible API.",
    )
    out.add_argument("--config", type=str, help="YAML file of these settings; flags overrule it")
    out.add_class_arguments(ServeConfig)
    return out


def run(argv: Sequence[str]) -> int:
    """Serve until SIGTERM or SIGINT."""
    config = split(parse(parser(), argv), ServeConfig)
    from veratune.serving.app import create_server, run_replicas

    if config.replicas > 1:
        run_replicas(config)
    else:
        create_server(config).run()
    return 0
