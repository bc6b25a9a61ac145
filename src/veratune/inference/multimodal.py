"""Completions of a vision-language model: conversations with images in, text out."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import TextStreamer

from veratune.tasks.multimodal.image_encoding import MAX_PIXELS
from veratune.tasks.multimodal.media import Media
from veratune.tasks.text.chat_template import render, with_parts
from veratune.tasks.text.conversation import Message
from veratune.tasks.vision.images import read_image


def generate_with_images(
    model: Any,
    processor: Any,
    conversations: Sequence[Sequence[Message]],
    images: Sequence[Sequence[Media]],
    *,
    max_new_tokens: int = 128,
    batch_size: int = 16,
    tools: Sequence[Sequence[dict[str, Any]]] | None = None,
    temperature: float = 0.0,
    streamer: TextStreamer | None = None,
) -> Iterator[str]:
    """Generate the assistant's next turn of each conversation.

    Args:
        model: The vision-language model.
        processor: Its processor. Prompts of one batch are padded on the left.
        conversations: The prompts; an image is a part {type: image} of a message.
        images: The images of each conversation, in the order of their parts.
        max_new_tokens: Longest completion, in tokens.
        batch_size: Prompts in one batch.
        tools: The tools of each conversation, as JSON schemas; None for none.
        temperature: Sampling temperature; 0 is greedy.
        streamer: Prints the tokens of a single conversation as they come.

    Yields:
        The completions, in order.

    Raises:
        ValueError: An image cannot be decoded.
    """
    tokenizer = processor.tokenizer
    sampling = {"do_sample": temperature > 0} | (
        {"temperature": temperature} if temperature else {}
    )
    for start in range(0, len(conversations), batch_size):
        chosen = range(start, min(start + batch_size, len(conversations)))
        prompts = [
            render(
                [with_parts(message) for message in conversations[i]],
                tokenizer,
                add_generation_prompt=True,
                tools=tools[i] if tools is not None else (),
            )
            for i in chosen
        ]
        pictures = [[read_image(media, MAX_PIXELS) for media in images[i]] for i in chosen]
        inputs = processor(
            images=pictures if any(pictures) else None,
            text=prompts,
            padding=True,
            padding_side="left",
            add_special_tokens=False,
            return_tensors="pt",
        ).to(model.device)
        with torch.inference_mode():
            out = model.generate(
                **inputs,
                max_new_tokens=max_new_tokens,
                pad_token_id=tokenizer.pad_token_id,
                streamer=streamer,
                **sampling,
            )
        for tokens in out[:, inputs["input_ids"].shape[1] :]:
            yield str(tokenizer.decode(tokens, skip_special_tokens=True)).strip()


def stream_with_images(
    model: Any,
    processor: Any,
    conversation: Sequence[Message],
    images: Sequence[Media],
    *,
    max_new_tokens: int = 512,
    temperature: float = 0.0,
) -> str:
    """Generate the assistant's next turn and print it token by token.

    Args:
        model: The vision-language model.
        processor: Its processor.
        conversation: The messages so far.
        images: Their images, in the order of their parts.
        max_new_tokens: Longest completion, in tokens.
        temperature: Sampling temperature; 0 is greedy.

    Returns:
        The whole completion.
    """
    streamer = TextStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    return next(
        generate_with_images(
            model,
            processor,
            [conversation],
            [images],
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            streamer=streamer,
        )
    )
