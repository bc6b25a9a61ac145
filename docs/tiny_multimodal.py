"""Tiny models with random weights that hear or see, and inputs for them; for docs/families.md."""

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from torch import Tensor

_IMAGE = 95  # the token that stands for a piece of an image
_HIDDEN = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_ENCODER = {
    **_HIDDEN, "vocab_size": 99, "intermediate_size": 48,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_DECODER = {**_ENCODER, "num_key_value_heads": 2, "max_position_embeddings": 64}
_MROPE = {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]}}
_PATCHES = {**_HIDDEN, "intermediate_size": 48, "patch_size": 8}
_VISION = {**_PATCHES, "image_size": 16}
_WAVE = {
    **_ENCODER, "conv_dim": [8, 8], "conv_kernel": [10, 3], "conv_stride": [5, 2],
    "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 2, "mask_time_prob": 0.0,
}  # fmt: skip
_SPEECH = {
    "vocab_size": 99, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48, "max_target_positions": 32, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "decoder_start_token_id": 1,
}  # fmt: skip
_QWEN_VISION = {
    "depth": 2, "hidden_size": 32, "num_heads": 4, "patch_size": 4, "spatial_merge_size": 2,
    "temporal_patch_size": 1,
}  # fmt: skip
_QWEN_TOKENS = {
    "image_token_id": _IMAGE, "video_token_id": 96, "vision_start_token_id": 97,
    "vision_end_token_id": 98,
}  # fmt: skip


def _llama() -> hf.LlamaConfig:
    return hf.LlamaConfig(**_DECODER)


def _gemma3() -> hf.Gemma3Config:
    text = {**_DECODER, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 16}
    return hf.Gemma3Config(
        text_config=text, vision_config={**_VISION, "vision_use_head": False},
        mm_tokens_per_image=4, image_token_index=_IMAGE, boi_token_index=96, eoi_token_index=97,
    )  # fmt: skip


def _paligemma() -> hf.PaliGemmaConfig:
    vision = {
        **_VISION, "model_type": "siglip_vision_model", "projection_dim": 32,
        "vision_use_head": False,
    }  # fmt: skip
    return hf.PaliGemmaConfig(
        text_config={**_DECODER, "model_type": "gemma", "head_dim": 8}, vision_config=vision,
        projection_dim=32, hidden_size=32, image_token_index=_IMAGE,
    )  # fmt: skip


def _two_towers(kind: Any, positions: int, **more: Any) -> Any:
    text = {**_ENCODER, "max_position_embeddings": positions}
    return kind(text_config=text, vision_config=_VISION, **more)


def _whisper() -> hf.WhisperConfig:
    return hf.WhisperConfig(**_SPEECH, num_mel_bins=8, max_source_positions=20)


def _speech_to_text() -> hf.Speech2TextConfig:
    return hf.Speech2TextConfig(
        **_SPEECH, input_feat_per_channel=8, conv_channels=16, max_source_positions=64
    )


def _smolvlm(kind: Any) -> Any:
    return kind(
        text_config=_llama().to_dict(), vision_config=_VISION, image_token_id=_IMAGE, scale_factor=2
    )


def _qwen2_5_vl() -> hf.Qwen2_5_VLConfig:
    vision = {
        **_QWEN_VISION, "out_hidden_size": 32, "intermediate_size": 48, "window_size": 16,
        "fullatt_block_indexes": [1],
    }  # fmt: skip
    return hf.Qwen2_5_VLConfig(
        text_config={**_DECODER, **_MROPE}, vision_config=vision, **_QWEN_TOKENS
    )


CONFIGS: dict[str, Callable[[], Any]] = {
    "audio-spectrogram-transformer": lambda: hf.ASTConfig(
        **_PATCHES, max_length=32, num_mel_bins=16
    ),
    "blip": lambda: _two_towers(
        lambda text_config, **k: hf.BlipConfig(
            text_config={**text_config, "encoder_hidden_size": 32, "sep_token_id": 2}, **k
        ),
        64,
        projection_dim=16,
    ),
    "clip": lambda: _two_towers(hf.CLIPConfig, 64, projection_dim=16),
    "gemma3": _gemma3,
    "hubert": lambda: hf.HubertConfig(**_WAVE),
    "idefics3": lambda: _smolvlm(hf.Idefics3Config),
    "llava": lambda: hf.LlavaConfig(
        text_config=_llama(),
        vision_config=hf.CLIPVisionConfig(**_VISION),
        image_token_index=_IMAGE,
        image_seq_length=4,
    ),
    "paligemma": _paligemma,
    "qwen2_5_vl": _qwen2_5_vl,
    "qwen2_vl": lambda: hf.Qwen2VLConfig(
        text_config={**_DECODER, **_MROPE},
        vision_config={**_QWEN_VISION, "embed_dim": 32, "in_channels": 3},
        **_QWEN_TOKENS,
    ),
    "siglip": lambda: _two_towers(hf.SiglipConfig, 8),
    "smolvlm": lambda: _smolvlm(hf.SmolVLMConfig),
    "speech_to_text": _speech_to_text,
    "vilt": lambda: hf.ViltConfig(**_ENCODER, image_size=16, patch_size=8),
    "wav2vec2": lambda: hf.Wav2Vec2Config(**_WAVE),
    "wavlm": lambda: hf.WavLMConfig(**_WAVE),
    "whisper": _whisper,
    "yolos": lambda: hf.YolosConfig(**_PATCHES, image_size=[16, 16], num_detection_tokens=4),
}


def inputs_of(family: str) -> dict[str, Tensor]:
    """Four different inputs for a family's tiny model."""
    generator = torch.Generator().manual_seed(1)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    ids = torch.randint(3, 90, (4, 8), generator=generator)
    images = {"pixel_values": noise(4, 3, 16, 16)}
    if family in ("wav2vec2", "hubert", "wavlm"):
        return {"input_values": noise(4, 400)}
    if family == "audio-spectrogram-transformer":
        return {"input_values": noise(4, 32, 16)}
    if family == "whisper":
        return {"input_features": noise(4, 8, 40), "decoder_input_ids": ids}
    if family == "speech_to_text":
        return {"input_features": noise(4, 40, 8), "decoder_input_ids": ids}
    if family == "yolos":
        return images
    if family in ("clip", "siglip", "blip", "vilt"):
        return {"input_ids": ids, **images}
    if family in ("idefics3", "smolvlm"):  # one token an image, and a dimension of images
        return {"input_ids": _with_image(ids, 1), "pixel_values": images["pixel_values"][:, None]}
    seen = _with_image(ids, 4)
    kinds = (seen == _IMAGE).long()
    if family.startswith("qwen"):
        grid = torch.tensor([[1, 4, 4]] * 4)
        patches = {"pixel_values": noise(64, 48), "image_grid_thw": grid}
        return {"input_ids": seen, "mm_token_type_ids": kinds, **patches}
    if family == "gemma3":
        return {"input_ids": seen, "token_type_ids": kinds, **images}
    if family == "paligemma":
        return {"input_ids": seen, "token_type_ids": torch.zeros_like(kinds), **images}
    return {"input_ids": seen, **images}


def _with_image(ids: Tensor, tokens: int) -> Tensor:
    return torch.cat([torch.full((len(ids), tokens), _IMAGE), ids], 1)
