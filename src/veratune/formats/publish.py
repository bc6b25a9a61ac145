"""Publish an adapter on the hub: the file, a model card, and on request a PEFT LoRA folder."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from veratune.errors import AdapterFileError
from veratune.formats import native
from veratune.formats.hub import FILE_NAME, upload
from veratune.formats.model_card import model_card
from veratune.formats.peft_lora import write_lora

RESULT_NAME = "results.json"  # beside an adapter that `veratune train` wrote


def publish(
    file: Path,
    repo: str,
    folder: Path,
    *,
    private: bool = False,
    peft_lora: bool = False,
    model: nn.Module | None = None,
    dataset: str = "",
    result: Mapping[str, Any] | None = None,
) -> str:
    """Upload an adapter to the hub.

    Args:
        file: The adapter's file.
        repo: "user/repo".
        folder: A folder to prepare the files in.
        private: Make a new repository private.
        peft_lora: Add a PEFT LoRA folder.
        model: The base model, for `peft_lora` of fused layers or convolutions.
        dataset: The data set, for the card.
        result: Metrics "before" and "after"; None: those of results.json beside the file, if any.

    Returns:
        The commit's page.

    Raises:
        AdapterFileError: The file is not a readable adapter.
        DataError: The hub refuses or cannot be reached.
    """
    data = native.read_bytes(file)
    try:
        adapter = native.decode(data)
    except AdapterFileError as error:
        raise type(error)(f"{file}: {error}") from None
    metrics = _result(file) if result is None else result
    card = model_card(
        adapter,
        repo,
        file_bytes=len(data),
        dataset=dataset,
        before=metrics.get("before"),
        after=metrics.get("after"),
        peft_lora=peft_lora,
    )
    folder.mkdir(parents=True)
    (folder / FILE_NAME).write_bytes(data)
    (folder / "README.md").write_text(card)
    if peft_lora:
        write_lora(adapter, folder / "peft-lora", model)
    return upload(folder, repo, private=private)


def _result(file: Path) -> Mapping[str, Any]:
    try:
        result = json.loads((file.parent / RESULT_NAME).read_text())
    except (OSError, ValueError):
        return {}
    return result if isinstance(result, dict) else {}
