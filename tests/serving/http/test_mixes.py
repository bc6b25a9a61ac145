"""Mixes over HTTP: completions of a mix are those of the mixed adapter, beside its parts."""

import concurrent.futures
import dataclasses

import openai
import pytest

import veratune as vt
from tests import fakes
from tests.serving.fakes import QV, adapter, generate_alone, small_llama
from tests.serving.http.fakes import FILES, RunningServer
from veratune.formats import native
from veratune.serving.keys import Caller

ONLY_D = dataclasses.replace(QV, vectors="d")
ANN, BOTH = Caller(("ann",)), Caller(("ann", "ben"))
PARTS = {name: adapter(small_llama, ONLY_D, i + 5) for i, name in enumerate("abc")}
PROMPT = [5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24]
MIXES = [{"a": 0.7, "b": 0.3}, {"a": 2.0, "b": -1.5, "c": 0.25}, {"c": 0.5}, {"a": 1.0, "c": 1.0}]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    made = RunningServer(tmp_path_factory.mktemp("mixes"))
    for name, part in PARTS.items():
        made.service.put("ann", name, native.encode(part))
    made.service.put("ben", "b", native.encode(PARTS["b"]))
    made.service.put("ann", "both", FILES["alice"])
    yield made
    made.stop()


def name_of(weights):
    return "+".join(f"{name}:{weight}" for name, weight in weights.items())


def greedy(own, tokens=8):
    ids = generate_alone(small_llama, PROMPT, own, tokens)
    tokenizer = fakes.tokenizer()
    ids = ids[: ids.index(tokenizer.eos_token_id)] if tokenizer.eos_token_id in ids else ids
    return tokenizer.decode(ids, skip_special_tokens=True)


def mixed(weights):
    return vt.mix([vt.MixPart(name, PARTS[name], w) for name, w in weights.items()])


def complete(client, model, tokens=8):
    reply = client.completions.create(
        model=model, prompt=PROMPT, max_tokens=tokens, temperature=0, logprobs=2
    )
    assert reply.model == model
    return reply


def test_mixes_and_their_parts_complete_in_one_batch_as_alone(server):
    wanted = {name: greedy(part) for name, part in PARTS.items()}
    wanted |= {name_of(weights): greedy(mixed(weights)) for weights in MIXES}
    wanted["base"] = greedy(None)
    assert len(set(wanted.values())) > 4
    client = server.openai()
    with concurrent.futures.ThreadPoolExecutor(8) as executor:
        models = [*wanted] * 3
        found = list(executor.map(lambda model: complete(client, model), models))
    for model, reply in zip(models, found, strict=True):
        assert reply.choices[0].text == wanted[model]
    assert server.engine.pool.pinned == 0


def test_log_probabilities_are_those_of_the_mixed_adapter(server):
    weights = MIXES[1]
    server.service.put("ann", "stored", native.encode(mixed(weights)))
    mix, stored = (
        complete(server.openai(), model).choices[0].logprobs
        for model in (name_of(weights), "stored")
    )
    assert mix.tokens == stored.tokens
    assert mix.token_logprobs == pytest.approx(stored.token_logprobs, abs=1e-5)


def test_a_mix_streams_and_has_a_prefix_cache_of_its_own(server):
    client, model = server.openai("both"), "a:0.1+ben/b:0.9"
    for cached in (0, 16):
        events = list(
            client.completions.create(
                model=model,
                prompt=PROMPT,
                max_tokens=8,
                temperature=0,
                stream=True,
                stream_options={"include_usage": True},
            )
        )
        assert {event.model for event in events} == {model}
        text = "".join(event.choices[0].text for event in events if event.choices)
        assert text == greedy(mixed({"a": 0.1, "b": 0.9}))
        assert events[-1].usage.prompt_tokens_details.cached_tokens >= cached
    key = server.service.resolve(BOTH, model).key
    find = server.engine.prefix_cache.find
    assert find(("ann", key), PROMPT) is not None  # for the caller's tenant, not that of a part
    assert find(("ben", key), PROMPT) is None


def test_a_chat_and_a_model_may_name_a_mix(server):
    client, model = server.openai(), name_of(MIXES[0])
    reply = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": "t5 t6"}], max_tokens=4
    )
    assert reply.model == model
    found = client.models.retrieve(model)
    assert (found.id, found.created > 0) == (model, True)


@pytest.mark.parametrize(
    ("model", "status", "why"),
    [
        ("a:0.5+zzz:0.5", 404, "the model 'zzz' does not exist, or this key may not use it"),
        ("a:0.5+ben/b:0.5", 404, "the model 'ben/b' does not exist, or this key may not use it"),
        ("a:0.5+both:0.5", 400, "vectors is 'both' in the one and 'd' in the other"),
        ("base:0.5+a:0.5", 400, "'base' is a base model"),
        ("a:0.5+b", 400, "'b' is no part of a mix"),
        ("+".join(["a:1"] * 9), 400, "8 are taken"),
    ],
)
def test_what_cannot_be_mixed_is_refused(server, model, status, why):
    with pytest.raises(openai.APIStatusError, match=why) as caught:
        complete(server.openai(), model)
    assert caught.value.status_code == status


def test_an_update_of_a_part_counts_at_once_and_a_deleted_part_leaves_memory(server):
    client, model, keys = server.openai(), "x:0.5+a:0.5", []

    def in_memory(key):
        prefix = server.engine.prefix_cache.find(("ann", key), PROMPT)
        return [key in server.engine.pool, prefix is not None]

    for part in ("b", "c"):
        server.service.put("ann", "x", native.encode(PARTS[part]))
        text = complete(client, model).choices[0].text
        assert text == greedy(mixed({part: 0.5, "a": 0.5}))
        keys.append(server.service.resolve(ANN, model).key)
        server.until_idle()
        assert in_memory(keys[-1]) == [True, True]
    assert in_memory(keys[0]) == [False, False]
    client.delete("/adapters/x", cast_to=object)
    assert in_memory(keys[1]) == [False, False]
    with pytest.raises(openai.NotFoundError, match="'x' does not exist"):
        complete(client, model)
