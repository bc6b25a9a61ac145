"""Fields of the OpenAI API and of vLLM that bodies do not declare.

Unknown fields are ignored, as OpenAI's clients send new ones every few months, with one line in the
log for each name. A field that would change the result and cannot be honoured is refused.
"""

from collections.abc import Mapping

from veratune.serving.http.errors import ApiError

# They do not change a result, so no word is lost about them.
HARMLESS = frozenset(
    {
        "access_programs", "background_options", "cache_salt", "context_management",
        "guided_decoding_backend", "include", "include_reasoning", "metadata", "prediction",
        "priority", "prompt_cache_key", "prompt_cache_options", "prompt_cache_retention",
        "reasoning", "reasoning_effort", "request_id", "safety_identifier", "service_tier",
        "store", "user", "verbosity",
    }
)  # fmt: skip

# Each with the values at which it changes nothing.
REFUSED: Mapping[str, tuple[object, ...]] = {
    "add_generation_prompt": (True,),
    "allowed_token_ids": ([],),
    "audio": (),
    "background": (False,),
    "bad_words": ([],),
    "chat_template": (),
    "continue_final_message": (False,),
    "conversation": (),
    "documents": ([],),
    "early_stopping": (False,),
    "echo": (False,),
    "function_call": ("none",),
    "functions": ([],),
    "guided_whitespace_pattern": (),
    "image": (),
    "include_stop_str_in_output": (False,),
    "length_penalty": (1,),
    "logits_processors": ([],),
    "max_tool_calls": (),
    "modalities": (["text"],),
    "moderation": (),
    "previous_response_id": (),
    "prompt": (),
    "prompt_embeds": (),
    "prompt_logprobs": (),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "suffix": ("",),
    "truncate_prompt_tokens": (),
    "truncation": ("disabled",),
    "use_beam_search": (False,),
    "web_search_options": (),
}


_STATELESS = "responses are not kept here; send the whole conversation as input"
_REASONS = {"previous_response_id": _STATELESS, "conversation": _STATELESS}


def check_extra_fields(extra: Mapping[str, object]) -> list[str]:
    """Check the fields that a body does not declare.

    Args:
        extra: Names and values; null ones are left out already.

    Returns:
        Names that are not known at all.

    Raises:
        ApiError: One would change the result.
    """
    for name, value in extra.items():
        if name in REFUSED and value not in REFUSED[name]:
            reason = _REASONS.get(name, "it is not supported here; leave it out")
            raise ApiError(400, f"{name}: {reason}", param=name)
    return [name for name in extra if name not in HARMLESS and name not in REFUSED]
