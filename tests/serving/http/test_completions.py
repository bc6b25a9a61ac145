"""Completions: echo with log-probabilities, offsets, spaces, and the fields of other servers."""

import json

import openai
import pytest
from openai.types import EmbeddingCreateParams
from openai.types.chat.completion_create_params import CompletionCreateParamsBase as ChatParams
from openai.types.completion_create_params import CompletionCreateParamsBase as CompletionParams
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests import fakes
from tests.serving.fakes import engine
from tests.serving.http.fakes import FILES, RunningServer
from veratune.serving.engine.requests import GenerationRequest, OutputDelta
from veratune.serving.engine.sampling import SampledToken, SamplingParams
from veratune.serving.http.completion_builder import CompletionBuilder
from veratune.serving.http.errors import ApiError
from veratune.serving.http.fields import HARMLESS, REFUSED, check_extra_fields
from veratune.serving.http.schemas.encoding import EmbeddingBody
from veratune.serving.http.schemas.generation import ChatBody, CompletionBody


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    server = RunningServer(tmp_path_factory.mktemp("completions"))
    with server.http() as http:
        assert http.put("/v1/adapters/alice", content=FILES["alice"]).status_code == 201
    yield server
    server.stop()


def test_echo_scores_the_prompt(served):
    """As lm-eval asks: a prompt of token ids, echo, log-probabilities, one token or none."""
    prompt = "turn the light on"
    ids = fakes.tokenizer()(prompt, add_special_tokens=False)["input_ids"]
    with served.openai() as client:
        options = {"model": "alice", "echo": True, "logprobs": 2, "temperature": 0}
        none = client.completions.create(prompt=prompt, max_tokens=0, **options)
        (choice,) = none.choices
        assert (choice.text, choice.finish_reason) == (prompt, "length")
        assert none.usage.completion_tokens == 0
        scores = choice.logprobs
        assert "".join(scores.tokens) == prompt
        assert scores.token_logprobs[0] is None
        assert scores.top_logprobs[0] is None
        assert all(value < 0 for value in scores.token_logprobs[1:])
        for at, token in zip(scores.text_offset, scores.tokens, strict=True):
            assert prompt[at:].startswith(token)
        two = client.completions.create(prompt=[ids, ids[:3]], max_tokens=2, **options)
        assert two.choices[0].logprobs.token_logprobs[: len(ids)] == pytest.approx(
            scores.token_logprobs, abs=1e-4
        )
        assert two.choices[1].text.startswith("turn")
        chunks = list(client.completions.create(prompt=ids, max_tokens=2, stream=True, **options))
        assert "".join(c.choices[0].text for c in chunks) == two.choices[0].text
        streamed = [c.choices[0].logprobs for c in chunks if c.choices[0].logprobs]
        whole = two.choices[0].logprobs
        assert [at for part in streamed for at in part.text_offset] == whole.text_offset
        assert (
            client.completions.create(model="base", prompt="hi", max_tokens=0).choices[0].text == ""
        )


def test_usage_comes_with_every_event_if_asked(served):
    options = {"include_usage": True, "continuous_usage_stats": True}
    with served.openai() as client:
        chunks = list(
            client.completions.create(
                model="base", prompt=[4, 5], max_tokens=5, stream=True, stream_options=options,
                extra_body={"ignore_eos": True},
            )
        )  # fmt: skip
    counts = [chunk.usage.completion_tokens for chunk in chunks]
    assert counts == sorted(counts)
    assert (counts[-1], chunks[-1].choices) == (5, [])


def metaspace():
    words = ["<unk>", "\u2581the", "\u2581park", "s", "\u2581in", "<0xC3>", "<0xA9>", "</s>"]
    vocab = {word: i for i, word in enumerate(words)}
    made = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", eos_token="</s>")


def test_a_completion_keeps_the_space_that_it_begins_with():
    """A Metaspace tokenizer drops a text's first space, which a completion's is not."""
    server = engine()
    server.tokenizer = metaspace()
    for continues, wanted in ((True, " park"), (False, "park")):
        request = GenerationRequest(
            "a", [4, 1], SamplingParams(temperature=0, max_tokens=1, logit_bias=((2, 100.0),)),
            continues_text=continues,
        )  # fmt: skip
        server.submit(request)
        while server.scheduler.waiting or server.scheduler.running:
            server.step()
        assert request.result() == wanted


def test_offsets_count_characters_of_the_text():
    tokens = [4, 1, 5, 6, 2, 7, 3]
    request = GenerationRequest("a", tokens, SamplingParams(prompt_logprobs=1))
    request.prompt_logprobs = [None, *(SampledToken(t, -1.0, ((t, -1.0),)) for t in tokens[1:])]
    text = "in theé parks"
    builder = CompletionBuilder(metaspace(), "x", [request], [text])
    last = SampledToken(1, -1.0)
    (choice,) = builder.whole([[OutputDelta(" the", last, "stop")]], None).choices
    assert choice.text == text + " the"
    assert choice.logprobs.text_offset == [0, 2, 6, 6, 7, 12, 12, 13]
    assert choice.logprobs.tokens[2:4] == ["bytes:\\xc3", "bytes:\\xa9"]
    assert choice.logprobs.tokens[5] == "</s>"


@pytest.mark.parametrize(
    ("params", "body"),
    [(ChatParams, ChatBody), (CompletionParams, CompletionBody), (EmbeddingCreateParams, EmbeddingBody)],
)  # fmt: skip
def test_every_field_of_the_openai_client_is_known(params, body):
    """A new release of the client must not bring fields that are ignored without a decision."""
    assert set(params.__annotations__) <= set(body.model_fields) | HARMLESS | set(REFUSED)


def test_fields_that_change_the_result_are_refused(served):
    assert check_extra_fields({"store": True, "suffix": "", "length_penalty": 1.0}) == []
    assert check_extra_fields({"brand_new": 1}) == ["brand_new"]
    with pytest.raises(ApiError, match="suffix: it is not supported here"):
        check_extra_fields({"suffix": "x"})
    talk = [{"role": "user", "content": "hi"}]
    with served.openai() as client:
        client.chat.completions.create(
            model="base", messages=talk, max_tokens=2, store=True, metadata={"a": "b"},
            service_tier="auto", user="me", seed=3, reasoning_effort="low", verbosity="low",
            extra_body={"min_p": 0.1, "repetition_penalty": 1.1, "min_tokens": 1,
                        "stop_token_ids": [3], "ignore_eos": True, "never_seen": 1},
        )  # fmt: skip
        for field, value in (("modalities", ["audio"]), ("suffix", "x"), ("use_beam_search", True)):
            with pytest.raises(openai.BadRequestError) as caught:
                client.chat.completions.create(
                    model="base", messages=talk, extra_body={field: value}
                )
            assert caught.value.param == field
        with pytest.raises(openai.BadRequestError) as caught:
            client.completions.create(model="base", prompt="hi", max_tokens=500)
        assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "prompt")
        with pytest.raises(openai.BadRequestError, match="best_of"):
            client.completions.create(model="base", prompt="hi", best_of=3)


def test_tokenize_and_detokenize(served):
    tokenizer = fakes.tokenizer()
    with served.http() as http:
        found = http.post("/tokenize", json={"model": "base", "prompt": "turn on"}).json()
        assert found["tokens"] == tokenizer("turn on")["input_ids"]
        assert (found["count"], found["max_model_len"]) == (len(found["tokens"]), 128)
        talk = [{"role": "user", "content": "hi"}]
        chat = http.post(
            "/tokenize", json={"model": "alice", "messages": talk, "return_token_strs": True}
        ).json()
        assert chat["token_strs"][0] == "<|user|>"
        text = http.post("/detokenize", json={"model": "base", "tokens": chat["tokens"]}).json()
        assert text == {"prompt": "<|user|>hi</s><|assistant|>"}
        for path, body, status in (
            ("/tokenize", {"model": "base"}, 400),
            ("/tokenize", {"model": "ghost", "prompt": "x"}, 404),
            ("/detokenize", {"model": "base", "tokens": [10**6]}, 400),
            ("/detokenize", {"model": "ghost", "tokens": [1]}, 404),
        ):
            assert http.post(path, json=body).status_code == status
        assert json.loads(http.post("/tokenize", content=b"{").content)["error"]["param"]
