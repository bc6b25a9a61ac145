"""SamplingParams: from logits to the next token, and from tokens to text that may be sent."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from veratune.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How an answer is drawn.

    max_tokens: of the answer; temperature: 0 takes the likeliest token; top_p: the fewest tokens that hold this much of the
    probability; top_k: so many tokens, 0 for all; seed: draws the same answer again; stop: texts that end the answer and are no part of
    it; logprobs: how many likely tokens to tell with each one, None for none. Before all of it a token's logit is

        logit[t] + bias[t] - frequency_penalty * count[t] - presence_penalty * (count[t] > 0)

    where count is how often the answer has it (OpenAI's API reference). Raises ConfigError.
    """

    max_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()

    def __post_init__(self) -> None:
        bounds = (
            ("temperature", 0.0, 2.0),
            ("top_p", 0.0, 1.0),
            ("frequency_penalty", -2.0, 2.0),
            ("presence_penalty", -2.0, 2.0),
        )
        for field, least, most in bounds:
            value = getattr(self, field)
            if not math.isfinite(value) or not least <= value <= most:
                raise ConfigError(
                    f"{field} is {value}; a number from {least:g} to {most:g} is wanted"
                )
        if self.top_p == 0:
            raise ConfigError(
                "top_p is 0; a number over 0 is wanted (temperature 0 takes the likeliest token)"
            )
        for field, least in (("max_tokens", 1), ("top_k", 0)):
            if getattr(self, field) < least:
                raise ConfigError(f"{field} is {getattr(self, field)}; at least {least} is wanted")
        if self.logprobs is not None and not 0 <= self.logprobs <= 20:
            raise ConfigError(f"logprobs is {self.logprobs}; 0 to 20 is wanted")
        if len(self.stop) > 4 or any(not text for text in self.stop):
            raise ConfigError(
                f"stop is {list(self.stop)}; up to 4 texts that are not empty are wanted"
            )
        if any(not -100 <= value <= 100 for _, value in self.logit_bias):
            raise ConfigError("the bias of a token is a number from -100 to 100")

    @property
    def weighs(self) -> bool:
        """Whether there are penalties or a bias."""
        return bool(self.frequency_penalty or self.presence_penalty or self.logit_bias)


@dataclasses.dataclass(frozen=True)
class SampledToken:
    """A token that was drawn, with its log probability and those of the likeliest, where they were asked for."""

    token_id: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()


def sample(
    logits: Tensor,
    samplings: Sequence[SamplingParams],
    generators: Sequence[torch.Generator | None],
    output_token_ids: Sequence[Sequence[int]],
) -> list[SampledToken]:
    """The next token of each row.

    logits: (rows, vocabulary); generators: one for each row that draws; output_token_ids: the tokens of its answer so far. Log probabilities are
    those of the model, before penalties, temperature and cuts.
    """
    best = logits.argmax(-1).tolist()
    found = []
    for row, (sampling, generator) in enumerate(zip(samplings, generators, strict=True)):
        token, own = best[row], logits[row]
        if sampling.weighs:
            own = _weighed(own, sampling, output_token_ids[row])
            token = int(own.argmax())
        if sampling.temperature > 0:
            token = _draw(own, sampling, generator)
        if sampling.logprobs is None:
            found.append(SampledToken(token))
            continue
        logs = logits[row].float().log_softmax(-1)
        values, tokens = logs.topk(min(sampling.logprobs, len(logs)))
        found.append(
            SampledToken(
                token, logs[token].item(), tuple(zip(tokens.tolist(), values.tolist(), strict=True))
            )
        )
    return found


def _weighed(logits: Tensor, sampling: SamplingParams, output_token_ids: Sequence[int]) -> Tensor:
    """(vocabulary) with penalties and bias."""
    out = logits.float().clone()
    tokens, counts = torch.tensor(output_token_ids, dtype=torch.long, device=out.device).unique(
        return_counts=True
    )
    out[tokens] -= sampling.frequency_penalty * counts + sampling.presence_penalty
    for token, value in sampling.logit_bias:
        out[token] += value
    return out


def _draw(logits: Tensor, sampling: SamplingParams, generator: torch.Generator | None) -> int:
    # The best score is 0, so that the least temperature makes no infinity of it.
    scores = (logits.float() - logits.max()) / max(sampling.temperature, 1e-5)
    if sampling.top_k or sampling.top_p < 1:
        kept = min(sampling.top_k or len(scores), len(scores))
        values, tokens = scores.topk(kept)
        shares = values.softmax(-1)
        if sampling.top_p < 1:
            before = shares.cumsum(-1) - shares  # what the likelier ones hold
            before[0] = -1  # the first is always kept
            shares = shares.masked_fill(before >= sampling.top_p, 0.0)
        return int(tokens[shares.multinomial(1, generator=generator)])
    return int(scores.softmax(-1).multinomial(1, generator=generator))


class Detokenizer:
    """Tokens to text, piece by piece: what is sent is never taken back.

    Held back: bytes that are no whole character yet, and text that may become a stop.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self.tokenizer, self.stop = tokenizer, stop
        self.tokens: list[int] = []
        self.stopped = False
        self._text = ""  # whole characters so far
        self._sent = 0
        self._from = 0  # tokens from here are decoded again, for what stands between tokens
        self._read = 0  # tokens whose text is in _text

    def add(self, token: int) -> str:
        """Take a token. Returns the text that may be sent now."""
        self.tokens.append(token)
        unread = self._unread()
        if not unread.endswith("�"):
            self._text += unread
            self._from, self._read = self._read, len(self.tokens)
        return self._send(final=False)

    def end(self) -> str:
        """The rest, when no token comes any more."""
        if not self.stopped:
            self._text += self._unread()
            self._from = self._read = len(self.tokens)
        return self._send(final=True)

    def _unread(self) -> str:
        """The text of the tokens that are not in _text yet."""
        before = self.tokenizer.decode(
            self.tokens[self._from : self._read], skip_special_tokens=True
        )
        return str(self.tokenizer.decode(self.tokens[self._from :], skip_special_tokens=True))[
            len(before) :
        ]

    def _send(self, final: bool) -> str:
        if self.stopped:
            return ""
        longest = max(map(len, self.stop), default=0)
        start = max(0, self._sent - longest)
        hits = [at for at in (self._text.find(text, start) for text in self.stop) if at >= 0]
        upto = len(self._text)
        if hits:
            self.stopped, upto = True, min(hits)
        elif not final:
            for size in range(min(longest - 1, upto), 0, -1):
                tail = self._text[upto - size :]
                if any(text.startswith(tail) for text in self.stop):
                    upto -= size
                    break
        piece = self._text[self._sent : upto]
        self._sent = max(self._sent, upto)
        return piece
