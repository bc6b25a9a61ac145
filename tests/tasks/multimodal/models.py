"""Tiny vision-language and speech models with their processors, as save_pretrained writes them."""

import json
import tempfile
from pathlib import Path

import torch
import transformers as hf
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from tests import fakes
from veratune.tasks.multimodal.processors import without_video

TEXT = {
    "vocab_size": 320, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1,
    "initializer_range": fakes.LIVELY,
}  # fmt: skip
VISION = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "patch_size": 8,
    "image_size": 16, "initializer_range": fakes.LIVELY,
}  # fmt: skip


def template(image: str) -> str:
    """A chat template that knows contents as lists of parts alone, as those of these models do."""
    return (
        "{% for m in messages %}<|{{ m.role }}|>{% for c in m.content %}{% if c.type == 'image' %}" + image
        + "{% else %}{{ c.text }}{% endif %}{% endfor %}</s>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )  # fmt: skip


def tokenizer(*special: str, **named: str):
    made = fakes.tokenizer()
    made.chat_template = None
    made.add_tokens(list(special), special_tokens=True)
    if named:
        made._set_model_specific_special_tokens(special_tokens=named)
    return made


def image_id(made, token: str) -> int:
    return made.convert_tokens_to_ids(token)


def idefics3(smol: bool = False):
    tokens = tokenizer("<image>", "<fake_token_around_image>", "<end_of_utterance>", "<global-img>")
    sizes = {"size": {"longest_edge": 32}, "max_image_size": {"longest_edge": 16}, "resample": 2}
    images = SmolVLMImageProcessorPil(**sizes) if smol else Idefics3ImageProcessorPil(**sizes)
    more = {"image_seq_len": 1, "chat_template": template("<image>")}
    if smol:
        processor = without_video(hf.SmolVLMProcessor)(images, tokens, None, **more)
    else:
        processor = hf.Idefics3Processor(images, tokens, **more)
    config = (hf.SmolVLMConfig if smol else hf.Idefics3Config)(
        text_config=hf.LlamaConfig(**TEXT).to_dict(), vision_config=VISION, scale_factor=2,
        image_token_id=image_id(tokens, "<image>"), pad_token_id=1,
    )  # fmt: skip
    model = hf.SmolVLMForConditionalGeneration if smol else hf.Idefics3ForConditionalGeneration
    return fakes.seeded(lambda: model(config)), processor


def qwen2_vl(newer: bool = False):
    tokens = tokenizer("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
    images = Qwen2VLImageProcessorPil(
        patch_size=4, merge_size=2, temporal_patch_size=1, size={"shortest_edge": 64, "longest_edge": 1024}
    )  # fmt: skip
    kind = without_video(hf.Qwen2_5_VLProcessor if newer else hf.Qwen2VLProcessor)
    marks = "<|vision_start|><|image_pad|><|vision_end|>"
    processor = kind(images, tokens, None, chat_template=template(marks))
    vision = {"depth": 2, "hidden_size": 32, "num_heads": 4, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 1}  # fmt: skip
    vision |= (
        {"out_hidden_size": 32, "intermediate_size": 48, "window_size": 16, "fullatt_block_indexes": [1]}
        if newer
        else {"embed_dim": 32, "in_channels": 3}
    )  # fmt: skip
    ids = {
        "image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>", "vision_start_token_id": "<|vision_start|>",
        "vision_end_token_id": "<|vision_end|>",
    }  # fmt: skip
    config = (hf.Qwen2_5_VLConfig if newer else hf.Qwen2VLConfig)(
        text_config=TEXT | {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]}},
        vision_config=vision, **{name: image_id(tokens, token) for name, token in ids.items()},
    )  # fmt: skip
    model = hf.Qwen2_5_VLForConditionalGeneration if newer else hf.Qwen2VLForConditionalGeneration
    return fakes.seeded(lambda: model(config)), processor


def llava():
    tokens = tokenizer("<image>")
    images = LlavaImageProcessorPil(
        size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}
    )
    processor = hf.LlavaProcessor(
        images, tokens, patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=template("<image>"),
    )  # fmt: skip
    config = hf.LlavaConfig(
        text_config=hf.LlamaConfig(**TEXT), vision_config=hf.CLIPVisionConfig(**VISION),
        image_token_index=image_id(tokens, "<image>"), image_seq_length=4,
    )  # fmt: skip
    return fakes.seeded(lambda: hf.LlavaForConditionalGeneration(config)), processor


def gemma3():
    named = {"image_token": "<soft>", "boi_token": "<boi>", "eoi_token": "<eoi>"}
    tokens = tokenizer(*named.values(), **named)
    images = Gemma3ImageProcessorPil(size={"height": 16, "width": 16})
    processor = hf.Gemma3Processor(
        images, tokens, image_seq_length=4, chat_template=template("<boi>")
    )
    text = TEXT | {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 16}
    config = hf.Gemma3Config(
        text_config=text, vision_config=VISION | {"vision_use_head": False}, mm_tokens_per_image=4,
        image_token_index=image_id(tokens, "<soft>"), boi_token_index=image_id(tokens, "<boi>"), eoi_token_index=image_id(tokens, "<eoi>"),
    )  # fmt: skip
    model = fakes.seeded(lambda: hf.Gemma3ForConditionalGeneration(config))
    projection = model.model.multi_modal_projector.mm_input_projection_weight  # starts at zero
    torch.nn.init.normal_(projection, std=fakes.LIVELY)
    return model, processor


VISION_LANGUAGE = {
    "idefics3": idefics3,
    "smolvlm": lambda: idefics3(smol=True),
    "qwen2_vl": qwen2_vl,
    "qwen2_5_vl": lambda: qwen2_vl(newer=True),
    "llava": llava,
    "gemma3": gemma3,
}


def whisper(languages: tuple[str, ...] = ()):
    """English alone, or of several languages by their codes."""
    bpe = json.loads(fakes.tokenizer().backend_tokenizer.to_str())["model"]
    tokens = hf.WhisperTokenizer(vocab=bpe["vocab"], merges=[tuple(pair) for pair in bpe["merges"]])
    marks = ["<|endoftext|>", "<|startoftranscript|>", *(f"<|{code}|>" for code in languages), "<|translate|>"]  # fmt: skip
    marks += ["<|transcribe|>", "<|startoflm|>", "<|startofprev|>", "<|nospeech|>", "<|notimestamps|>"]  # fmt: skip
    tokens.add_tokens(marks, special_tokens=True)
    ids = dict(zip(marks, tokens.convert_tokens_to_ids(marks), strict=True))
    tokens.pad_token = "<|endoftext|>"
    processor = hf.WhisperProcessor(hf.WhisperFeatureExtractor(feature_size=8, chunk_length=1), tokens)  # fmt: skip
    end = ids["<|endoftext|>"]
    special = {"pad_token_id": end, "bos_token_id": end, "eos_token_id": end, "decoder_start_token_id": ids["<|startoftranscript|>"]}  # fmt: skip
    config = hf.WhisperConfig(
        vocab_size=len(tokens), d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=48, decoder_ffn_dim=48, num_mel_bins=8, max_source_positions=50, max_target_positions=32,
        init_std=fakes.LIVELY, dropout=0.0, **special,
    )  # fmt: skip
    model = fakes.seeded(lambda: hf.WhisperForConditionalGeneration(config))
    more = {"is_multilingual": bool(languages), "no_timestamps_token_id": ids["<|notimestamps|>"]}
    if languages:
        more["lang_to_id"] = {f"<|{code}|>": ids[f"<|{code}|>"] for code in languages}
        more["task_to_id"] = {job: ids[f"<|{job}|>"] for job in ("transcribe", "translate")}
    model.generation_config = hf.GenerationConfig(**special, **more)
    return model, processor


def ctc(kind: str = "wav2vec2"):
    letters = ["<pad>", "<s>", "</s>", "<unk>", "|", *"abcdefghijklmnopqrstuvwxyz'"]
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "vocab.json"
        path.write_text(json.dumps({letter: i for i, letter in enumerate(letters)}))
        tokens = hf.Wav2Vec2CTCTokenizer(str(path))
    extractor = hf.Wav2Vec2FeatureExtractor(return_attention_mask=True)
    made, model = {
        "wav2vec2": (hf.Wav2Vec2Config, hf.Wav2Vec2ForCTC),
        "hubert": (hf.HubertConfig, hf.HubertForCTC),
        "wavlm": (hf.WavLMConfig, hf.WavLMForCTC),
    }[kind]
    config = made(
        vocab_size=len(letters), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        conv_dim=[8, 8], conv_kernel=[10, 3], conv_stride=[80, 2], num_feat_extract_layers=2, num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=2, mask_time_prob=0.0, pad_token_id=0, feat_extract_norm="layer", layerdrop=0.0,
        hidden_dropout=0.0, attention_dropout=0.0, activation_dropout=0.0, feat_proj_dropout=0.0, final_dropout=0.0,
        initializer_range=fakes.LIVELY,
    )  # fmt: skip
    return fakes.seeded(lambda: model(config)), hf.Wav2Vec2Processor(extractor, tokens)


SPEECH = {
    "whisper": whisper,
    "wav2vec2": ctc,
    "hubert": lambda: ctc("hubert"),
    "wavlm": lambda: ctc("wavlm"),
}


def folder(name: str, path: Path) -> str:
    """The folder of a tiny model."""
    model, processor = (VISION_LANGUAGE | SPEECH)[name]()
    model.save_pretrained(path)
    processor.save_pretrained(path)
    return str(path)
