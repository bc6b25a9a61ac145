"""Log-probabilities of prompts, and the other ways in which a completion ends."""

import pytest
import torch

from tests.serving.fakes import QV, adapter, engine, generate_alone, run_all, small_llama
from veratune.adapter import install
from veratune.errors import ConfigError
from veratune.serving.engine.requests import GenerationRequest
from veratune.serving.engine.sampling import SamplingParams


@pytest.mark.parametrize("chunk", [3, 256])
def test_prompt_logprobs_are_those_of_a_plain_forward_pass(chunk):
    """All positions, in chunks or at once, with an adapter and beside other prompts."""
    own, prompt = adapter(small_llama, QV, 0), [4, 9, 5, 7, 11, 4, 4, 8, 6, 20]
    params = SamplingParams(temperature=0, max_tokens=0, prompt_logprobs=2)
    scored = GenerationRequest("a", prompt, params, key="own", load=lambda: own)
    short = GenerationRequest("a", prompt[:7], params)
    free = GenerationRequest("b", prompt[:8], SamplingParams(temperature=0, max_tokens=4))
    server = engine(max_num_batched_tokens=chunk, prefix_cache_bytes=10**7)
    tokens, outputs = run_all(server, [scored, short, free])
    for request, adapted in ((scored, own), (short, None)):
        model = small_llama().eval()
        if adapted is not None:
            install(model, adapted, "x")
        with torch.no_grad():
            logs = model(torch.tensor([request.tokens])).logits[0].log_softmax(-1)
        assert request.prompt_logprobs[0] is None
        assert len(request.prompt_logprobs) == len(request.tokens)
        for i, token in enumerate(request.prompt_logprobs[1:]):
            assert token.token_id == request.tokens[i + 1]
            assert token.logprob == pytest.approx(logs[i, token.token_id].item(), abs=1e-4)
            assert [t for t, _ in token.top_logprobs] == logs[i].topk(2).indices.tolist()
        last = outputs[id(request)][-1]
        assert (last.text, last.token, last.finish_reason) == ("", None, "length")
        assert request.output_token_ids == []
    assert tokens[2] == generate_alone(small_llama, prompt[:8], None, 4)[: len(tokens[2])]


def test_a_cached_prefix_does_not_hide_prompt_logprobs():
    server = engine(prefix_cache_bytes=10**7)
    prompt = list(range(4, 24))
    run_all(server, [GenerationRequest("a", prompt, SamplingParams(temperature=0, max_tokens=2))])
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    request = GenerationRequest("a", prompt, params)
    run_all(server, [request])
    assert request.cached_tokens == 0
    assert len(request.prompt_logprobs) == 20


def test_stop_tokens_end_of_sequence_and_min_tokens():
    wanted = generate_alone(small_llama, [4, 5], None, 12)
    server = engine()
    server.eos_token_ids = {wanted[4]}

    def tokens(**options):
        request = GenerationRequest("t", [4, 5], SamplingParams(temperature=0, **options))
        _, outputs = run_all(server, [request])
        return request.output_token_ids, outputs[id(request)][-1].finish_reason

    end = wanted.index(wanted[4])
    assert tokens(max_tokens=12) == (wanted[:end], "stop")
    assert tokens(max_tokens=12, ignore_eos=True) == (wanted, "length")
    stop = wanted.index(wanted[2])
    ended = tokens(max_tokens=12, ignore_eos=True, stop_token_ids=(wanted[2],))
    assert ended == (wanted[:stop], "stop")
    longer, _ = tokens(max_tokens=12, min_tokens=8)
    assert len(longer) >= 8
    with pytest.raises(ConfigError, match="stop_token_ids has tokens that this model does not"):
        server.submit(
            GenerationRequest("t", [4], SamplingParams(max_tokens=2, stop_token_ids=(300,)))
        )
