"""Completions of a causal model: batched for scores, streamed for people."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from veratune.tasks.text.chat_template import render
from veratune.tasks.text.conversation import Message


def generate_completions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[list[Message]],
    *,
    max_new_tokens: int = 128,
    batch_size: int = 16,
    tools: Sequence[Sequence[dict[str, Any]]] | None = None,
    **search: Any,
) -> Iterator[str]:
    """Generate the assistant's next turn of each conversation, greedily or by beam search.

    Args:
        model: The causal model.
        tokenizer: Its tokenizer. Prompts of one batch are padded on the left.
        conversations: The prompts, each a list of messages.
        max_new_tokens: Longest completion, in tokens.
        batch_size: Prompts in one batch.
        tools: The tools of each conversation, as JSON schemas; None for none.
        search: Settings of transformers' `generate`, such as num_beams.

    Yields:
        The completions, in order.
    """
    side = tokenizer.padding_side
    tokenizer.padding_side = "left"
    try:
        for start in range(0, len(conversations), batch_size):
            prompts = [
                render(
                    conversations[i],
                    tokenizer,
                    add_generation_prompt=True,
                    tools=tools[i] if tools is not None else (),
                )
                for i in range(start, min(start + batch_size, len(conversations)))
            ]
            inputs = tokenizer(
                prompts, return_tensors="pt", padding=True, add_special_tokens=False
            ).to(model.device)
            with torch.inference_mode():
                out = model.generate(  # type: ignore[operator]
                    **inputs,
                    max_new_tokens=max_new_tokens,
                    do_sample=False,
                    pad_token_id=tokenizer.pad_token_id,
                    **search,
                )
            for tokens in out[:, inputs["input_ids"].shape[1] :]:
                yield str(tokenizer.decode(tokens, skip_special_tokens=True)).strip()
    finally:
        tokenizer.padding_side = side


def stream_completion(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    conversation: list[Message],
    *,
    max_new_tokens: int = 512,
    temperature: float = 0.0,
) -> str:
    """Generate the assistant's next turn and print it token by token.

    Args:
        model: The causal model.
        tokenizer: Its tokenizer.
        conversation: The messages so far.
        max_new_tokens: Longest completion, in tokens.
        temperature: Sampling temperature; 0 is greedy.

    Returns:
        The whole completion.
    """
    inputs = tokenizer(
        render(conversation, tokenizer, add_generation_prompt=True),
        return_tensors="pt",
        add_special_tokens=False,
    ).to(model.device)
    sampling = (
        {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    )
    with torch.inference_mode():
        out = model.generate(  # type: ignore[operator]
            **inputs,
            max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.pad_token_id,
            streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
            **sampling,
        )
    completion = out[0, inputs["input_ids"].shape[1] :]
    return str(tokenizer.decode(completion, skip_special_tokens=True)).strip()


def exact_match(completions: Iterable[str], references: Iterable[str]) -> float:
    """The share of completions that equal their reference, ignoring spaces at the ends."""
    pairs = list(zip(completions, references, strict=True))
    return sum(c.strip() == r.strip() for c, r in pairs) / len(pairs)
