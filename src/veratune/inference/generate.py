"""Answers of a causal model: batched and greedy for scores, streamed for people."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from veratune.tasks.text.language import Message, render


def generate_completions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[list[Message]],
    *,
    max_new_tokens: int = 128,
    batch_size: int = 16,
    **search: Any,
) -> Iterator[str]:
    """The model's next turn in each conversation, in order: greedily decoded, or by beams.

    max_new_tokens: per answer. search: settings of transformers' generate, such as num_beams. Prompts of one batch are padded on the left.
    """
    side = tokenizer.padding_side
    tokenizer.padding_side = "left"
    try:
        for start in range(0, len(conversations), batch_size):
            prompts = [
                render(conversation, tokenizer, add_generation_prompt=True)
                for conversation in conversations[start : start + batch_size]
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
    """The model's next turn, printed as it comes, and returned. temperature: 0 is greedy."""
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
    return str(
        tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    ).strip()


def exact_match(answers: Iterable[str], wanted: Iterable[str]) -> float:
    """The share of answers that are the wanted text, spaces at the ends apart."""
    pairs = list(zip(answers, wanted, strict=True))
    return sum(a.strip() == w.strip() for a, w in pairs) / len(pairs)
