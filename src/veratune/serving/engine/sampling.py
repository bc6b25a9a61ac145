"""Sampling parameters of a request, and the tokens that are sampled."""

import dataclasses
import math

from veratune.errors import ConfigError

_RANGES = (
    ("temperature", 0.0, 2.0),
    ("top_p", 0.0, 1.0),
    ("min_p", 0.0, 1.0),
    ("frequency_penalty", -2.0, 2.0),
    ("presence_penalty", -2.0, 2.0),
    ("repetition_penalty", 0.0, 100.0),
)
MAX_LOGPROBS = 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How a completion is sampled; names and defaults are those of the OpenAI API and vLLM.

    Logits l of a step change in this order before temperature and cuts:

        l[t] = l[t] / repetition_penalty if l[t] > 0 else l[t] * repetition_penalty
               for tokens t of the prompt and the completion
        l[t] = l[t] - frequency_penalty * count[t] - presence_penalty * (count[t] > 0)
               where count is over the completion
        l[t] = l[t] + logit_bias[t]

    Args:
        max_tokens: Most tokens of the completion; 0 computes the prompt only.
        min_tokens: Tokens before which nothing may end the completion.
        temperature: Scale of randomness; 0 takes the most likely token.
        top_p: Sample from the fewest tokens with this much probability.
        top_k: Sample from the k most likely tokens; 0: all.
        min_p: Drop tokens below this fraction of the most likely token's probability.
        seed: Seed of the completion; the same seed gives the same completion.
        stop: Texts that end the completion and are not part of it.
        stop_token_ids: Tokens that end the completion.
        ignore_eos: Whether end-of-sequence tokens do not end the completion.
        logprobs: Return log-probabilities, with this many alternatives; None: none.
        prompt_logprobs: The same for the tokens of the prompt.
        frequency_penalty: See above.
        presence_penalty: See above.
        repetition_penalty: See above; 1 changes nothing.
        logit_bias: Pairs of (token id, value added to its logit).

    Raises:
        ConfigError: names the field, its value and what is wanted.
    """

    max_tokens: int = 256
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()

    def __post_init__(self) -> None:
        for field, least, most in _RANGES:
            value = getattr(self, field)
            if not math.isfinite(value) or not least <= value <= most:
                raise ConfigError(
                    f"{field} is {value}; a number from {least:g} to {most:g} is wanted"
                )
        if self.top_p == 0:
            raise ConfigError(
                "top_p is 0; a number over 0 is wanted (temperature 0 takes the likeliest token)"
            )
        if self.repetition_penalty == 0:
            raise ConfigError("repetition_penalty is 0; a number over 0 is wanted")
        for field in ("max_tokens", "min_tokens", "top_k"):
            if getattr(self, field) < 0:
                raise ConfigError(f"{field} is {getattr(self, field)}; at least 0 is wanted")
        if self.min_tokens > self.max_tokens:
            raise ConfigError(
                f"min_tokens is {self.min_tokens}; at most max_tokens, {self.max_tokens}, is wanted"
            )
        for field in ("logprobs", "prompt_logprobs"):
            value = getattr(self, field)
            if value is not None and not 0 <= value <= MAX_LOGPROBS:
                raise ConfigError(f"{field} is {value}; 0 to {MAX_LOGPROBS} is wanted")
        self._check_stops()

    def _check_stops(self) -> None:
        if len(self.stop) > 4 or any(not text for text in self.stop):
            raise ConfigError(
                f"stop is {list(self.stop)}; up to 4 texts that are not empty are wanted"
            )
        if len(self.stop_token_ids) > 64:
            raise ConfigError(
                f"stop_token_ids has {len(self.stop_token_ids)} tokens; at most 64 are wanted"
            )
        if any(not -100 <= value <= 100 for _, value in self.logit_bias):
            raise ConfigError("logit_bias has a value outside -100 to 100")

    @property
    def has_penalties(self) -> bool:
        """Whether earlier tokens change the logits."""
        return bool(
            self.frequency_penalty or self.presence_penalty or self.repetition_penalty != 1.0
        )


@dataclasses.dataclass(frozen=True)
class SampledToken:
    """A token with its log-probability, where that was requested.

    Args:
        token_id: The token.
        logprob: Its log-probability under the unmodified model; None if not requested.
        top_logprobs: Most likely tokens with their log-probabilities.
    """

    token_id: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()
