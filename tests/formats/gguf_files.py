"""Tiny GGUF files, written by their documented layout: what the GGUF tests share."""

from pathlib import Path

import gguf
import numpy as np
import torch
from torch import nn

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows in GGUF's order, spelled out: row 2 i + j of a head is its row i + j * half."""
    size = weight.shape[0] // heads
    order = [
        head * size + i + j * (size // 2)
        for head in range(heads)
        for i in range(size // 2)
        for j in range(2)
    ]
    return weight[order]


def write_llama(model: nn.Module, path: Path) -> Path:
    """A Llama model as a float32 GGUF file, with a vocabulary of numbers."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"t{i}" for i in range(config.vocab_size)])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)

    def add(name: str, weight: torch.Tensor) -> None:
        writer.add_tensor(f"{name}.weight", np.ascontiguousarray(weight.detach().numpy()))

    add("token_embd", model.model.embed_tokens.weight)
    add("output_norm", model.model.norm.weight)
    add("output", model.lm_head.weight)
    for i in range(config.num_hidden_layers):
        for name, short in NAMES.items():
            weight = model.get_submodule(f"model.layers.{i}.{name}").weight
            if short == "attn_q":
                weight = interleaved(weight, config.num_attention_heads)
            if short == "attn_k":
                weight = interleaved(weight, config.num_key_value_heads)
            add(f"blk.{i}.{short}", weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def weights(path: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a GGUF file in float32."""
    return {
        tensor.name: torch.from_numpy(
            np.array(gguf.quants.dequantize(tensor.data, tensor.tensor_type))
        )
        for tensor in gguf.GGUFReader(str(path)).tensors
    }
