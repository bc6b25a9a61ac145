"""The files for PEFT's MetaMathQA comparison: the prompt's format, the answers, and the adapter's size."""

import importlib.util
from pathlib import Path

import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

from tests import fakes
from veratune.config import VeraConfig
from veratune.targets import find_sites
from veratune.tasks.text.chat_template import read_chat_template, render

FOLDER = Path(__file__).parents[2] / "benchmarks" / "metamathqa"
SETTINGS = yaml.safe_load((FOLDER / "train.yaml").read_text())


def prepare():
    spec = importlib.util.spec_from_file_location("prepare", FOLDER / "prepare.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_rows_are_those_of_the_comparison():
    long = {"query": "q" * 700, "response": "r" * 700}
    rows = list(prepare().train_rows([{"query": "1+1?", "response": "2"}, long]))
    prompt = "Question: 1+1? Think step by step.\nAnswer:"
    assert rows == [{"prompt": prompt, "completion": "2"}]
    (row,) = prepare().test_rows([{"question": "1+1?", "answer": "so\n#### 1,002"}])
    assert row == {"prompt": prompt, "answer": "1002"}
    talk = [
        {"role": "user", "content": rows[0]["prompt"]},
        {"role": "assistant", "content": rows[0]["completion"]},
    ]
    tokenizer = fakes.tokenizer()
    text = render(talk, tokenizer, chat_template=read_chat_template(str(FOLDER / "prompt.jinja")))
    assert text == f"{prompt}2{tokenizer.eos_token}"


def test_the_adapter_of_llama_3_2_3b_has_as_many_values_as_the_page_says():
    config = LlamaConfig(
        vocab_size=128_256,
        hidden_size=3072,
        intermediate_size=8192,
        num_hidden_layers=28,
        num_attention_heads=24,
        num_key_value_heads=8,
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    own = VeraConfig(
        rank=SETTINGS["rank"],
        targets=tuple(SETTINGS["targets"]),
        vectors=SETTINGS["vectors"],
        basis=SETTINGS["basis"],
    )
    sites = list(find_sites(model, own))
    page = (FOLDER.parents[1] / "docs" / "metamathqa.md").read_text()
    assert f"{len(sites) * own.rank:,} values\non {len(sites)} layers" in page
    lora = sum(32 * (s + t) for s, t in [(3072, 3072), (3072, 1024)]) * 28
    assert f"{lora:,}" in page
