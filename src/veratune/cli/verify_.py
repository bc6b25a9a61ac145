"""veratune verify"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from veratune.cli.parsing import Parser, new_parser, parse
from veratune.errors import VeratuneError

if TYPE_CHECKING:
    from veratune.adapter import Adapter


def parser() -> Parser:
    out = new_parser(
        "verify",
        "Check an adapter file: its digest, its basis, its base model's weights and its signature.",
    )
    out.add_argument("file", type=str, help="adapter file")
    out.add_argument(
        "--model",
        type=str | None,
        default=None,
        help="base model (folder, .gguf file or id), whose layers and weights are compared",
    )
    out.add_argument(
        "--public-key",
        type=str | None,
        default=None,
        help="Ed25519 public key, PEM: FILE.sig must be its signature of the file",
    )
    return out


def run(argv: Sequence[str]) -> int:
    flags = parse(parser(), argv)
    from veratune.formats import native, signature

    adapters: list[Adapter] = []

    def content() -> None:
        adapters.append(native.read(flags.file))

    checks: list[tuple[str, Callable[[], None] | None]] = [
        ("digest, form and basis", content),
        (
            "base model",
            None
            if flags.model is None
            else lambda: _check_base(adapters[0], flags.file, flags.model),
        ),
        (
            "signature",
            None
            if flags.public_key is None
            else lambda: signature.verify(flags.file, flags.public_key),
        ),
    ]
    failed = False
    for name, check in checks:
        if check is None:
            print(f"not checked  {name}")
            continue
        try:
            check()
            print(f"ok           {name}")
        except VeratuneError as error:
            failed = True
            print(f"FAILED       {name}: {error}")
            if not adapters:
                break
    print(f"{flags.file}: {'NOT VERIFIED' if failed else 'verified'}")
    return 1 if failed else 0


def _check_base(adapter: "Adapter", file: str, model: str) -> None:
    """Raise BaseModelError unless the layers and the weight fingerprint are the base model's."""
    from veratune.errors import BaseModelError
    from veratune.inference.adapted import load_with_adapter

    if adapter.weight_fingerprint is None:
        raise BaseModelError("the adapter holds no fingerprint of its base model's weights")
    load_with_adapter(model, file, device="cpu")
