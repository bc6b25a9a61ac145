"""Tiny models of real architectures, made from configurations, and a tokenizer trained on the spot: no downloads."""

from pathlib import Path

import torch
import transformers as hf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn

from veratune.attach import heads_of, vectors_of

WORDS = "turn the light in kitchen on off please set timer for minutes good bad film I love hate this is a great awful movie"
CHAT = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"

# Models are trained, so their weights have a size; at the usual start of 0.02 such narrow ones compute next to nothing.
LIVELY = 0.2


def seeded(make):
    torch.manual_seed(0)
    return make().eval()


def bert(labels: int | None = None, **options) -> nn.Module:
    config = hf.BertConfig(
        vocab_size=300, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
        max_position_embeddings=64, num_labels=labels or 2, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, initializer_range=LIVELY, **options,
    )  # fmt: skip
    return seeded(lambda: hf.BertForSequenceClassification(config) if labels else hf.BertModel(config))


def llama(**options) -> nn.Module:
    config = hf.LlamaConfig(
        **{
            "vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2, "max_position_embeddings": 128, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1,
            "initializer_range": LIVELY, **options,
        }
    )  # fmt: skip
    return seeded(lambda: hf.LlamaForCausalLM(config))


def gpt2(layers: int = 2, width: int = 32) -> nn.Module:
    config = hf.GPT2Config(
        vocab_size=300, n_embd=width, n_layer=layers, n_head=2, n_positions=64, bos_token_id=0, eos_token_id=1,
        resid_pdrop=0.0, initializer_range=LIVELY, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    return seeded(lambda: hf.GPT2LMHeadModel(config))


def perceptron(n: int = 12, hidden: int = 10, m: int = 6) -> nn.Module:
    return seeded(lambda: nn.Sequential(nn.Linear(n, hidden), nn.Tanh(), nn.Linear(hidden, m, bias=False)))


def encoder(batch_first: bool = True) -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 2, 24, batch_first=batch_first, dropout=0.0)
    return seeded(lambda: nn.TransformerEncoder(layer, 2, enable_nested_tensor=batch_first))


def scramble(model: nn.Module, name: str, seed: int = 0, size: float = 0.3) -> nn.Module:
    """Give an adapter vectors (and a head) as training would: no longer the identity."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for vectors in vectors_of(model, name):
            for p in vectors.parameters():
                p.add_((torch.randn(p.shape, generator=generator) * size).to(p.dtype))
        for module in heads_of(model, name).values():
            for p in module.parameters():
                p.add_((torch.randn(p.shape, generator=generator) * size).to(p.dtype))
    return model


def tokenizer() -> hf.PreTrainedTokenizerFast:
    made = Tokenizer(models.BPE(unk_token=None))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<|user|>", "<|assistant|>", "<|system|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        [WORDS] * 3, trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet)
    )
    out = hf.PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="</s>")
    out.chat_template = CHAT
    return out


def folder(model: nn.Module, path: Path) -> str:
    """A model and a tokenizer as save_pretrained writes them."""
    model.save_pretrained(path)
    tokenizer().save_pretrained(path)
    return str(path)
