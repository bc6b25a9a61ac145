"""Tiny engines, adapters with random vectors, and reference outputs that serving tests share."""

import dataclasses
import random
import time

import torch
import transformers

import veratune as vt
from tests import fakes
from veratune.adapter import install
from veratune.serving.engine.encoder import Encoder
from veratune.serving.engine.engine import Engine
from veratune.serving.engine.sampling import SamplingParams
from veratune.serving.engine.scheduler import SchedulerConfig
from veratune.serving.pool.pool import AdapterPool

QV = vt.VeraConfig(rank=6, targets=("query", "value"))
HEADED = vt.VeraConfig(rank=6, targets=("query", "value"), head=("classifier",))
GREEDY = SamplingParams(temperature=0, max_tokens=12)


def small_llama():
    return fakes.llama(num_hidden_layers=2)


def family(name):
    """A function that makes a tiny model of another family, by the name of its configuration."""

    def make():
        kind = getattr(transformers, f"{name}Config")
        fields = {field.name for field in dataclasses.fields(kind)}
        config = kind(
            vocab_size=300,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            max_position_embeddings=128,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
            initializer_range=0.2,
            **({"sliding_window": 8} if "sliding_window" in fields else {}),
        )
        return fakes.seeded(lambda: transformers.AutoModelForCausalLM.from_config(config))

    make.__name__ = name
    return make


# Mistral, Gemma 2 and 3 attend to the last 8 tokens only, in all layers or in every other one.
FAMILIES = [family(name) for name in ("Mistral", "Qwen2", "Qwen3", "Gemma", "Gemma2", "Gemma3Text")]


def adapter(make, config, number, name="x"):
    """An adapter for the model of `make`, with vectors drawn from the seed `number`."""
    model = vt.attach(make(), config, name)
    fakes.scramble(model, name, seed=number)
    return vt.extract(model, name)


def headed_adapter(config, number, labels=2):
    """An adapter for the tiny BERT with `labels` classes, vectors drawn from the seed `number`."""
    return adapter(lambda: fakes.bert(labels), config, number)


def engine(make=small_llama, rows=8, **options):
    """An engine over a tiny model with room for `rows` sequences."""
    model = make().eval()
    return Engine(
        model,
        fakes.tokenizer(),
        AdapterPool(model, slots=max(rows, 1)),
        config=SchedulerConfig(max_num_seqs=rows),
        max_model_len=128,
        **options,
    )


def encoder(rows=16, **options):
    """An encoder engine over a tiny BERT."""
    model = fakes.bert(2).eval()
    return Encoder(
        model,
        fakes.tokenizer(),
        AdapterPool(model, slots=rows),
        config=SchedulerConfig(max_num_seqs=rows),
        **options,
    )


def generate_alone(make, prompt, own, tokens):
    """Greedy tokens of transformers' generate, with one adapter in the model."""
    model = make().eval()
    if own is not None:
        install(model, own, "x")
    ids = torch.tensor([list(prompt)])
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=tokens,
        do_sample=False,
        pad_token_id=0,
    )
    return out[0, len(prompt) :].tolist()


def encode_alone(own, text, want, labels=2):
    """The logits or the embedding of one text, with one adapter in the model."""
    model = fakes.bert(labels).eval()
    if own is not None:
        install(model, own, "x")
    batch = fakes.tokenizer()([text], return_tensors="pt")
    with torch.no_grad():
        if want == "logits":
            return model(**batch).logits[0]
        hidden = model.base_model(**batch).last_hidden_state[0].mean(0)
    return hidden / hidden.norm()


def run_all(engine, requests):
    """Submit requests at random steps, step until all finish.

    Returns the tokens of each request, and its outputs by `id(request)`.
    """
    rng, waiting = random.Random(0), list(requests)
    outputs = {id(request): [] for request in requests}
    for request in requests:
        request.on_output = outputs[id(request)].append
    while waiting or engine.scheduler.waiting or engine.scheduler.running:
        while waiting and rng.random() < 0.6:
            engine.submit(waiting.pop(0))
        if not engine.step():
            time.sleep(0.001)  # adapters are being prepared in other threads
    tokens = [
        [delta.token.token_id for delta in outputs[id(r)] if getattr(delta, "token", None)]
        for r in requests
    ]
    return tokens, outputs
