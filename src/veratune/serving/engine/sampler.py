"""Sampler: the next token of every sequence of a batch, as a few operations on all rows."""

from collections.abc import Sequence

import torch
from torch import Tensor

from veratune.serving.engine.grammar import GrammarMatcher, forbidden_tokens
from veratune.serving.engine.sampling import SampledToken, SamplingParams


class SamplingState:
    """Sampling state of one sequence between steps.

    Args:
        params: How the sequence is sampled.
        prompt: Token ids of the prompt, for the repetition penalty.
        vocab_size: Width of the logits.
        device: Where the logits are.
        end_token_ids: Tokens that `min_tokens` forbids at first.
        seed: Seed of the random numbers; used where `params.temperature` is over 0.
        matcher: State of the sequence in its grammar.
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt: Sequence[int],
        vocab_size: int,
        device: torch.device,
        *,
        end_token_ids: Sequence[int] = (),
        seed: int = 0,
        matcher: GrammarMatcher | None = None,
    ) -> None:
        self.params, self.matcher = params, matcher
        self.generated = 0
        self.generator = torch.Generator().manual_seed(seed % 2**63)
        self.counts: Tensor | None = None
        self.seen: Tensor | None = None
        self.bias: tuple[Tensor, Tensor] | None = None
        self.end_tokens: Tensor | None = None
        if params.has_penalties:
            self.counts = torch.zeros(vocab_size, device=device)
            self.seen = torch.zeros(vocab_size, dtype=torch.bool, device=device)
            self.seen[torch.tensor(list(prompt), dtype=torch.long, device=device)] = True
        if params.logit_bias:
            tokens, values = zip(*params.logit_bias, strict=True)
            self.bias = (
                torch.tensor(tokens, device=device),
                torch.tensor(values, dtype=torch.float32, device=device),
            )
        if params.min_tokens and end_token_ids:
            self.end_tokens = torch.tensor(list(end_token_ids), device=device)

    def add(self, token: int) -> None:
        """Count a sampled token."""
        self.generated += 1
        if self.counts is not None and self.seen is not None:
            self.counts[token] += 1
            self.seen[token] = True


def sample(logits: Tensor, states: Sequence[SamplingState]) -> list[SampledToken]:
    """Sample the next token of each row.

    Args:
        logits: Logits of the last positions, shape (rows, vocab).
        states: One a row; `add` the token to each afterwards.

    Returns:
        One token a row. Log-probabilities are those of the model, before any change.
    """
    scores = _adjusted(logits, states)
    tokens = scores.argmax(-1)
    random_rows = [i for i, state in enumerate(states) if state.params.temperature > 0]
    if random_rows:
        index = torch.tensor(random_rows, device=logits.device)
        drawn = _draw(scores[index].float(), [states[i] for i in random_rows])
        tokens = tokens.index_copy(0, index, drawn)
    chosen = tokens.tolist()
    found = [SampledToken(token) for token in chosen]
    wanted = [i for i, state in enumerate(states) if state.params.logprobs is not None]
    if wanted:
        index = torch.tensor(wanted, device=logits.device)
        counts = [states[i].params.logprobs or 0 for i in wanted]
        told = token_logprobs(logits[index], [chosen[i] for i in wanted], counts)
        for i, token in zip(wanted, told, strict=True):
            found[i] = token
    return found


def token_logprobs(
    logits: Tensor, tokens: Sequence[int], counts: Sequence[int]
) -> list[SampledToken]:
    """Return given tokens with their log-probabilities.

    Args:
        logits: Shape (rows, vocab).
        tokens: The token of each row.
        counts: How many of the most likely tokens to return for each row.
    """
    logs = logits.float().log_softmax(-1)
    index = torch.tensor(list(tokens), device=logs.device)[:, None]
    own = logs.gather(1, index)[:, 0].tolist()
    values, ids = (t.tolist() for t in logs.topk(min(max(counts), logs.shape[1])))
    return [
        SampledToken(token, value, tuple(zip(row_ids[:count], row_values[:count], strict=True)))
        for token, value, row_ids, row_values, count in zip(
            tokens, own, ids, values, counts, strict=True
        )
    ]


def _adjusted(logits: Tensor, states: Sequence[SamplingState]) -> Tensor:
    """Return logits with penalties, biases and masks; the same tensor where no row has any."""
    penalised = [i for i, state in enumerate(states) if state.counts is not None]
    biased = [i for i, state in enumerate(states) if state.bias is not None]
    constrained = [i for i, state in enumerate(states) if state.matcher is not None]
    short = [
        i
        for i, state in enumerate(states)
        if state.end_tokens is not None and state.generated < state.params.min_tokens
    ]
    if not (penalised or biased or constrained or short):
        return logits
    out = logits.float().clone()
    if penalised:
        index = torch.tensor(penalised, device=out.device)
        out[index] = _penalised(out[index], [states[i] for i in penalised])
    if biased:
        pairs = [pair for i in biased if (pair := states[i].bias) is not None]
        rows = _rows_of(biased, [tokens for tokens, _ in pairs])
        tokens = torch.cat([tokens for tokens, _ in pairs])
        out.index_put_((rows, tokens), torch.cat([v for _, v in pairs]), accumulate=True)
    if short:
        ends = [end for i in short if (end := states[i].end_tokens) is not None]
        out[_rows_of(short, ends), torch.cat(ends)] = -torch.inf
    if constrained:
        matchers = [matcher for i in constrained if (matcher := states[i].matcher) is not None]
        index = torch.tensor(constrained, device=out.device)
        hidden = forbidden_tokens(matchers, out.shape[1], out.device)
        out[index] = out[index].masked_fill(hidden, -torch.inf)
    return out


def _rows_of(rows: Sequence[int], tokens: Sequence[Tensor]) -> Tensor:
    """Return the row number of each token, for tensors of tokens one row each."""
    device = tokens[0].device
    sizes = torch.tensor([len(t) for t in tokens], device=device)
    return torch.tensor(list(rows), device=device).repeat_interleave(sizes)


def _penalised(logits: Tensor, states: Sequence[SamplingState]) -> Tensor:
    def column(values: Sequence[float]) -> Tensor:
        return torch.tensor(list(values), device=logits.device)[:, None]

    counts = torch.stack([state.counts for state in states if state.counts is not None])
    seen = torch.stack([state.seen for state in states if state.seen is not None])
    repetition = column([state.params.repetition_penalty for state in states])
    repeated = torch.where(logits > 0, logits / repetition, logits * repetition)
    frequency = column([state.params.frequency_penalty for state in states])
    presence = column([state.params.presence_penalty for state in states])
    return torch.where(seen, repeated, logits) - frequency * counts - presence * (counts > 0)


def _draw(scores: Tensor, states: Sequence[SamplingState]) -> Tensor:
    """Sample a token of each row by inverting the cumulative distribution."""
    params = [state.params for state in states]
    device = scores.device
    # With the largest score at 0 no temperature, however small, makes an infinity of it.
    temperature = torch.tensor([max(p.temperature, 1e-5) for p in params], device=device)
    scaled = (scores - scores.amax(-1, keepdim=True)) / temperature[:, None]
    tokens: Tensor | None = None
    if any(p.top_k or p.top_p < 1 for p in params):
        scaled, tokens = scaled.sort(dim=-1, descending=True, stable=True)
        scaled = _cut(scaled, params)
    shares = scaled.double().softmax(-1)
    if any(p.min_p for p in params):
        floor = torch.tensor([p.min_p for p in params], device=device, dtype=shares.dtype)
        shares = shares.masked_fill(shares < floor[:, None] * shares.amax(-1, keepdim=True), 0.0)
    cumulative = shares.cumsum(-1)
    # A row's number depends on its seed alone, not on the rows beside it.
    uniform = torch.cat([torch.rand(1, generator=s.generator, dtype=torch.float64) for s in states])
    total = cumulative[:, -1:]
    target = (uniform.to(device)[:, None] * total).minimum(total.nextafter(torch.zeros_like(total)))
    index = torch.searchsorted(cumulative, target, right=True).clamp(max=scores.shape[1] - 1)
    return (index if tokens is None else tokens.gather(1, index))[:, 0]


def _cut(ranked: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Hide what top_k and top_p leave out; `ranked` has the most likely tokens first."""
    width, device = ranked.shape[1], ranked.device
    kept = torch.tensor([min(p.top_k or width, width) for p in params], device=device)
    ranked = ranked.masked_fill(torch.arange(width, device=device) >= kept[:, None], -torch.inf)
    shares = ranked.softmax(-1)
    before = shares.cumsum(-1) - shares
    before[:, 0] = -1  # the most likely token always stays
    top_p = torch.tensor([p.top_p if p.top_p < 1 else 2.0 for p in params], device=device)
    return ranked.masked_fill(before >= top_p[:, None], -torch.inf)
