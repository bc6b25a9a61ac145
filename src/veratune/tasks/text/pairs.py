"""Preference rows as messages: checks, and the token ids of a prompt and its completion."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

from veratune.errors import ConfigError, DataError
from veratune.tasks.text.chat_template import render
from veratune.tasks.text.conversation import Message, short

Messages = list[Message]


@dataclasses.dataclass(frozen=True)
class Pair:
    """A prompt and two completions of it, as messages."""

    prompt: Messages
    chosen: Messages
    rejected: Messages


def read_pair(number: int, row: Mapping[str, Any]) -> Pair:
    """Check one row of chosen and rejected.

    Args:
        number: The row's number, for errors.
        row: chosen and rejected, each text or messages, and with it or without a prompt.

    Returns:
        The pair; of whole conversations, the prompt is what they have in common.

    Raises:
        DataError: A side is empty, both are equal, or they answer different prompts.
    """
    chosen, rejected = (_messages(number, side, row[side]) for side in ("chosen", "rejected"))
    prompt = None if row.get("prompt") is None else read_prompt(number, row["prompt"])
    whole = [side[0]["role"] != "assistant" for side in (chosen, rejected)]
    if all(whole):
        common = 0
        while common < min(len(chosen), len(rejected)) and chosen[common] == rejected[common]:
            common += 1
        # Equal conversations differ nowhere: the last turn of each is then the completion.
        common = min(common, len(chosen) - 1, len(rejected) - 1)
        start, chosen, rejected = chosen[:common], chosen[common:], rejected[common:]
        if not start:
            raise DataError(
                f"row {number}: chosen and rejected have no turn in common; both must start with "
                "the same prompt"
            )
        if prompt is not None and start[-len(prompt) :] != prompt:
            raise DataError(
                f"row {number}: the prompt is not what chosen and rejected start with; leave the "
                "prompt column out, or give the completions alone"
            )
        prompt = start
    elif any(whole):
        raise DataError(
            f"row {number}: one of chosen and rejected starts with the assistant, the other is a "
            "whole conversation; give both in one form"
        )
    if prompt is None:
        raise DataError(
            f"row {number}: there is no prompt; give a column prompt, or whole conversations as "
            "chosen and rejected"
        )
    _check_completion(number, "chosen", chosen)
    _check_completion(number, "rejected", rejected)
    if chosen == rejected:
        raise DataError(
            f"row {number}: chosen and rejected are equal ({short(chosen[-1]['content'])}); a "
            "pair must differ, leave the row out"
        )
    return Pair(prompt, chosen, rejected)


def read_completion(number: int, row: Mapping[str, Any]) -> tuple[Messages, Messages, bool]:
    """Check one of KTO's rows: prompt, completion and a label.

    Raises:
        DataError: The completion is empty, or the label is neither true nor false.
    """
    completion = _messages(number, "completion", row["completion"])
    _check_completion(number, "completion", completion)
    label = row["label"]
    if label not in (True, False, 0, 1):
        raise DataError(f"row {number}: label is {label!r}; true (desirable) or false is wanted")
    return read_prompt(number, row["prompt"]), completion, bool(label)


def read_prompt(number: int, value: Any) -> Messages:
    """A prompt, text or messages, as messages.

    Raises:
        DataError: It is empty, or its last turn is the assistant's.
    """
    if isinstance(value, str):
        if not value.strip():
            raise DataError(f"row {number}: the prompt is empty")
        return [{"role": "user", "content": value}]
    prompt = _messages(number, "prompt", value)
    if prompt[-1]["role"] == "assistant":
        raise DataError(f"row {number}: the prompt ends with the assistant's turn, not the user's")
    return prompt


def encode_turns(
    number: int, prompt: Messages, completion: Messages, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[int]]:
    """Token ids of a prompt and of its completion, as the chat template writes them.

    They are tokenized apart, as they are when the model generates.

    Raises:
        ConfigError: The chat template rewrites the prompt when a completion follows.
    """
    before = render(prompt, tokenizer, add_generation_prompt=True)
    whole = render(prompt + completion, tokenizer)
    if not whole.startswith(before):
        raise ConfigError(
            f"row {number}: the tokenizer's chat template rewrites the prompt when a completion "
            "follows it, so the two cannot be told apart; use another template"
        )
    pieces = before, whole[len(before) :]
    ids = [tokenizer(piece, add_special_tokens=False)["input_ids"] for piece in pieces]
    return list(ids[0]), list(ids[1])


def _messages(number: int, role: str, value: Any) -> Messages:
    """Text as one turn of the assistant, or a list of messages, checked."""
    if isinstance(value, str):
        return [{"role": "assistant", "content": value}]
    if not isinstance(value, list) or not value:
        raise DataError(
            f"row {number}: {role} is {short(value)}; text or a list of {{role, content}} is wanted"
        )
    for message in value:
        if (
            not isinstance(message, dict)
            or not isinstance(message.get("role"), str)
            or not isinstance(message.get("content"), str)
        ):
            raise DataError(
                f"row {number}: a message of {role} is {short(message)}; {{role, content}} with "
                "text is wanted"
            )
        more = [k for k, v in message.items() if k not in ("role", "content") and v is not None]
        if more:
            raise DataError(
                f"row {number}: a message of {role} has {more[0]!r}, which preference data does "
                "not take; leave it out, or write it into the content"
            )
    return [{"role": message["role"], "content": message["content"]} for message in value]


def _check_completion(number: int, side: str, messages: Messages) -> None:
    last = messages[-1]
    for place, message in (("starts", messages[0]), ("ends", last)):
        if message["role"] != "assistant":
            raise DataError(
                f"row {number}: the completion {side} {place} with role {message['role']!r}, not "
                "the assistant"
            )
    if not last["content"].strip():
        raise DataError(f"row {number}: {side} is empty; give a completion or leave the row out")
