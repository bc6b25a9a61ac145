"""Embeddings of adapters' inputs, the index of a tenant, and the router that chooses by them."""

import json
import threading

import numpy as np
import pytest
import safetensors.numpy
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests import fakes
from tests.serving.fakes import small_llama
from tests.serving.http.fakes import FILES
from veratune.errors import (
    AdapterNotFoundError,
    AdapterStateError,
    ConfigError,
    DataError,
    StoreError,
)
from veratune.serving.feedback.models import Example
from veratune.serving.routing.adapter_embedding import AdapterEmbedding
from veratune.serving.routing.embedder import MAX_TOKENS, Embedder
from veratune.serving.routing.examples import parse_examples, training_texts, user_texts
from veratune.serving.routing.router import MAX_EXAMPLES, Router
from veratune.serving.routing.training import embed_feedback, embed_training_file
from veratune.serving.store.sqlite import SqliteStore

LIGHTS = [f"turn the light {word} in kitchen {i}" for i, word in enumerate(["on", "off"] * 6)]
FILMS = [f"{word} awful movie {i} I love it" for i, word in enumerate(["great", "bad"] * 6)]


@pytest.fixture(scope="module")
def embedder():
    return Embedder(small_llama(), fakes.tokenizer())


@pytest.fixture
def router(tmp_path, embedder):
    store = SqliteStore(tmp_path / "adapters.db")
    for tenant, name in (("ann", "lights"), ("ann", "films"), ("ben", "secret")):
        store.put(tenant, name, FILES["alice"])
    yield Router(store, embedder, refresh_seconds=0)
    store.close()


def unit(rows):
    rows = np.asarray(rows, np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def clusters(count, width=16, size=12, seed=0):
    rng = np.random.default_rng(seed)
    centres = unit(rng.standard_normal((count, width)))
    return [unit(c + 0.05 * rng.standard_normal((size, width))) for c in centres]


def test_a_text_has_the_mean_of_its_last_hidden_states_whatever_is_beside_it(embedder):
    texts = [LIGHTS[0], "a", FILMS[0] * 3, *LIGHTS[1:9]]
    found = embedder.embed(texts)
    model, tokenizer = small_llama(), fakes.tokenizer()
    for text, vector in zip(texts, found, strict=True):
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        with torch.no_grad():
            mean = model.model(input_ids=ids).last_hidden_state[0].mean(0)
        np.testing.assert_allclose(vector, (mean / mean.norm()).numpy(), atol=1e-5)


def test_only_the_first_tokens_of_a_text_count(embedder):
    long = "turn the light on " * 20_000
    assert len(embedder.tokens(long)) == min(MAX_TOKENS, 128)
    with pytest.raises(ConfigError, match="is empty"):
        embedder.embed(["x", " \n"])


def test_its_id_names_the_weights(embedder):
    other = small_llama()
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight.mul_(-1)
    assert Embedder(small_llama(), fakes.tokenizer()).id == embedder.id
    assert Embedder(other, fakes.tokenizer()).id != embedder.id


@given(st.integers(5, 40), st.integers(2, 12), st.integers(0, 2**31))
def test_an_embedding_survives_its_bytes_and_covers_its_own_inputs(count, width, seed):
    rows = np.random.default_rng(seed).standard_normal((count, width)) + 0.01
    vectors = unit(rows)
    made = AdapterEmbedding.fit("base@1", vectors)
    found = AdapterEmbedding.decode(made.encode())
    assert (found.embedder, found.threshold, found.examples) == ("base@1", made.threshold, count)
    np.testing.assert_array_equal(found.centroids, made.centroids)
    np.testing.assert_allclose(np.linalg.norm(found.centroids, axis=1), 1, atol=1e-5)
    assert 1 <= len(found.centroids) <= 4
    assert -1.001 <= found.threshold <= 1.001


def test_inputs_of_two_kinds_get_centroids_of_both():
    first, second = clusters(2)
    made = AdapterEmbedding.fit("x", np.concatenate([first, second]))
    nearest = (np.concatenate([first, second]) @ made.centroids.T).max(1)
    assert nearest.min() > 0.9


def damaged():
    good = AdapterEmbedding.fit("x", clusters(1)[0])
    metadata = {"veratune_routing": json.dumps({"embedder": "x", "threshold": 0.5, "examples": 9})}

    def file(array, metadata=metadata):
        return safetensors.numpy.save({"centroids": array}, metadata)

    row = np.ones((1, 4), np.float32)
    yield good.encode()[:-1], "damaged"
    yield b"", "damaged"
    yield b"\xff" * 100, "damaged"
    yield file(row.astype(np.float64)), "float64"
    yield file(np.full((1, 4), np.nan, np.float32)), "not finite"
    yield file(np.ones(4, np.float32)), "shape"
    yield file(np.ones((0, 4), np.float32)), "shape"
    yield file(row, {"veratune_routing": "[" * 100_000}), "damaged"
    yield file(row, {}), "damaged"
    yield (
        file(row, {"veratune_routing": '{"embedder": "x", "threshold": NaN, "examples": 1}'}),
        "not",
    )
    yield file(np.ones((1000, 1000), np.float32)), "bytes"


@pytest.mark.parametrize(("data", "words"), damaged())
def test_damaged_bytes_are_an_error_of_the_store(data, words):
    with pytest.raises(StoreError, match=f"damaged.*{words}|{words}"):
        AdapterEmbedding.decode(data)


def test_an_input_goes_to_the_adapter_with_the_nearest_examples(router):
    assert router.choose("ann", [[LIGHTS[0]]]) is None
    assert not router.has_choice("ann")
    router.put("ann", "lights", LIGHTS)
    made = router.put("ann", "films", [*FILMS, FILMS[0]])
    assert made.examples == len(FILMS)
    assert router.choose("ann", [[LIGHTS[3]]]) == "lights"
    assert router.choose("ann", [[text] for text in FILMS[:5]]) == "films"
    assert router.choose("ann", [["%%%% zzzz qqqq 9999 &&&& ~~~~"]]) is None
    assert router.choices == {"adapter": 2, "base": 2}
    assert router.has_choice("ann")


def test_another_tenants_adapters_are_never_chosen(router):
    router.put("ben", "secret", LIGHTS)
    assert router.choose("ann", [[LIGHTS[0]]]) is None
    assert router.choose("ben", [[LIGHTS[0]]]) == "secret"


def test_inputs_for_different_adapters_are_refused(router):
    router.put("ann", "lights", LIGHTS)
    router.put("ann", "films", FILMS)
    with pytest.raises(ConfigError, match=r"different models \(films, lights\)"):
        router.choose("ann", [[LIGHTS[0]], [FILMS[0]]])


def test_the_newest_message_that_is_near_to_an_adapter_decides(router):
    router.put("ann", "lights", LIGHTS)
    router.put("ann", "films", FILMS)
    noise = "%%%% zzzz qqqq 9999 &&&& ~~~~"
    assert router.choose("ann", [[noise, FILMS[0], LIGHTS[0]]]) == "films"
    assert router.choose("ann", [[LIGHTS[0], FILMS[0]]]) == "lights"
    assert router.choose("ann", [[noise, noise]]) is None


def test_a_deleted_adapter_is_not_chosen(router):
    router.put("ann", "lights", LIGHTS)
    router.put("ann", "films", FILMS)
    router.store.delete("ann", "lights")
    router.store.put("ann", "lights", FILES["bob"])  # another adapter of this name
    assert router.choose("ann", [[LIGHTS[0]]]) != "lights"
    router.index.refresh_seconds = 60
    router.choose("ann", [[FILMS[0]]])
    router.store.delete("ann", "films")  # by another process: the index still has it
    assert router.choose("ann", [[FILMS[0]]]) is None


def test_changes_of_other_processes_are_seen_after_the_refresh(router, embedder):
    other = Router(router.store, embedder)
    assert router.choose("ann", [[LIGHTS[0]]]) is None
    other.put("ann", "lights", LIGHTS)
    assert router.choose("ann", [[LIGHTS[0]]]) == "lights"
    router.index.refresh_seconds = 60
    other.put("ann", "lights", FILMS)
    assert router.choose("ann", [[LIGHTS[0]]]) == "lights"
    router.index.forget("ann")
    assert router.choose("ann", [[FILMS[0]]]) == "lights"


def test_embeddings_of_another_model_are_refused_or_logged(router, caplog):
    model = small_llama()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(-1)
    before = Router(router.store, Embedder(model, fakes.tokenizer()))
    before.put("ann", "lights", LIGHTS)
    for _ in range(2):
        with pytest.raises(AdapterStateError, match="embedded by another model.*send them again"):
            router.choose("ann", [[LIGHTS[0]]])
    assert sum("not chosen for auto" in record.message for record in caplog.records) == 1
    router.put("ann", "films", FILMS)
    assert router.choose("ann", [[FILMS[0]]]) == "films"


def test_what_cannot_be_embedded_is_not_stored(router):
    with pytest.raises(ConfigError, match="4 different example inputs; at least 5 are wanted"):
        router.put("ann", "lights", [*LIGHTS[:4], LIGHTS[0]])
    with pytest.raises(AdapterNotFoundError):
        router.put("ann", "none", LIGHTS)
    assert router.store.list_embeddings("ann") == {}
    said = router.put_training_data("ann", "lights", LIGHTS[:2])
    assert said.startswith("the model auto does not choose the adapter: 2 different")
    many = [f"{i} turn the light" for i in range(3 * MAX_EXAMPLES)]
    said = router.put_training_data("ann", "lights", many)
    assert said == f"the model auto chooses the adapter by {MAX_EXAMPLES} of its inputs"


def test_thousands_of_adapters_are_one_product(router, embedder):
    rng = np.random.default_rng(0)
    for i in range(2000):
        router.store.put("many", f"a{i}", b"x")
        vectors = unit(rng.standard_normal((8, embedder.width)))
        made = AdapterEmbedding.fit(embedder.id, vectors)
        router.store.put_embedding("many", f"a{i}", made.encode())
    router.store.put("many", "lights", b"x")
    router.put("many", "lights", LIGHTS)
    assert router.index.get("many").matrix.shape == (2 * 2000 + 3, embedder.width)
    assert router.choose("many", [[LIGHTS[2]]]) == "lights"


def test_calls_from_many_threads_agree(router):
    router.put("ann", "lights", LIGHTS)
    router.put("ann", "films", FILMS)
    found = []

    def work(text, wanted):
        found.extend((router.choose("ann", [[text]]), wanted) for _ in range(5))

    pairs = [(LIGHTS[0], "lights"), (FILMS[0], "films")] * 3
    threads = [threading.Thread(target=work, args=pair) for pair in pairs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 30
    assert all(name == wanted for name, wanted in found)


def test_inputs_of_training_runs_are_embedded(router):
    data = "".join(json.dumps({"prompt": text, "completion": "ok"}) + "\n" for text in LIGHTS)
    said = embed_training_file(router)("ann", "lights", data.encode())
    assert said == f"the model auto chooses the adapter by {len(LIGHTS)} of its inputs"
    examples = [
        Example(
            id=f"feedback-{text}",
            tenant="ann",
            adapter="films",
            kind="correction",
            messages=[{"role": "user", "content": text}, {"role": "assistant", "content": "ok"}],
            held_out=False,
            created=0.0,
            trained=True,
        )
        for text in FILMS
    ]
    embed_feedback(router)("ann", "films", examples)
    assert router.choose("ann", [[LIGHTS[1]]]) == "lights"
    assert router.choose("ann", [[FILMS[1]]]) == "films"


TALK = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "first"},
    {"role": "assistant", "content": "no"},
    {"role": "user", "content": [{"type": "text", "text": "sec"}, {"type": "text", "text": "ond"}]},
]


@pytest.mark.parametrize(
    ("data", "texts"),
    [
        (json.dumps(["a", {"prompt": "b"}, {"messages": TALK}]), ["a", "b", "second"]),
        ('"a"\n\n{"prompt": "b", "completion": "c"}\n', ["a", "b"]),
        (json.dumps({"prompt": TALK}), ["second"]),
        ("[]", []),
        ("", []),
    ],
)
def test_examples_are_read(data, texts):
    assert parse_examples(data.encode()) == texts


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b'["a", " "]', "example 2 has no text"),
        (b'{"messages": [{"role": "assistant", "content": "a"}]}', "example 1 has no text"),
        (b'{"messages": ["a"]}', "example 1 has no text"),
        (b"[1]", "example 1 has no text"),
        (b'{"examples": ["a"]}', "example 1 has no text"),
        (b"no", "no JSON in Unicode"),
        (b'"\\ud800"', "no JSON in Unicode"),
        (b"\xff", "no JSON in Unicode"),
        (b"[" * 100_000, "no JSON in Unicode"),
        (b'{"a":' * 100_000, "no JSON in Unicode"),
    ],
)
def test_what_is_no_example_is_refused(data, words):
    with pytest.raises(DataError, match=words):
        parse_examples(data)


def test_rows_without_a_text_of_the_user_are_left_out_of_training_data():
    rows = [{"messages": TALK}, {"messages": TALK[:1]}, {"prompt": "", "completion": "x"}]
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    assert training_texts(data) == ["second"]
    assert user_texts([]) == []
    assert user_texts(TALK) == ["second", "first"]
    assert user_texts(TALK * 3) == ["second", "first"] * 2
