"""Tiny models of real architectures, made from configurations, and a tokenizer trained on the spot: no downloads."""

import json
from pathlib import Path

import numpy as np
import torch
import transformers as hf
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn

from veratune.model_state import heads_of, vectors_of

WORDS = "turn the light in kitchen on off please set timer for minutes good bad film I love hate this is a great awful movie"
CHAT = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"

# Models are trained, so their weights have a size; at the usual start of 0.02 such narrow ones compute next to nothing.
LIVELY = 0.2


def seeded(make):
    torch.manual_seed(0)
    return make().eval()


MOE = {
    "vocab_size": 60,
    "hidden_size": 16,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": LIVELY,
    "pad_token_id": 0,
}


def mixtral() -> nn.Module:
    """Unseeded, as the other mixtures of experts: see `seeded`."""
    config = hf.MixtralConfig(**MOE, num_local_experts=4, num_experts_per_tok=2)
    return hf.MixtralForCausalLM(config)


def qwen3_moe() -> nn.Module:
    config = hf.Qwen3MoeConfig(
        **MOE, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=12, head_dim=8
    )
    return hf.Qwen3MoeForCausalLM(config)


def gpt_oss() -> nn.Module:
    """Its experts' matrices are stored transposed, and have biases."""
    config = hf.GptOssConfig(**MOE, num_local_experts=4, num_experts_per_tok=2, head_dim=8)
    return hf.GptOssForCausalLM(config)


def bert(labels: int | None = None, **options) -> nn.Module:
    config = hf.BertConfig(
        vocab_size=300, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
        max_position_embeddings=64, num_labels=labels or 2, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, initializer_range=LIVELY, **options,
    )  # fmt: skip
    return seeded(
        lambda: hf.BertForSequenceClassification(config) if labels else hf.BertModel(config)
    )


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
    return seeded(
        lambda: nn.Sequential(nn.Linear(n, hidden), nn.Tanh(), nn.Linear(hidden, m, bias=False))
    )


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
        [WORDS] * 3,
        trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet),
    )
    out = hf.PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    out.chat_template = CHAT
    return out


def folder(model: nn.Module, path: Path) -> str:
    """A model and a tokenizer as save_pretrained writes them."""
    model.save_pretrained(path)
    tokenizer().save_pretrained(path)
    return str(path)


def image_rows(count: int, side: int = 16, seed: int = 0) -> list[tuple[Image.Image, str]]:
    """Pictures of two classes: red above and dark below, or the other way round, with noise."""
    generator = np.random.default_rng(seed)
    out = []
    for i in range(count):
        values = generator.integers(0, 60, (side, side, 3))
        half = slice(0, side // 2) if i % 2 else slice(side // 2, side)
        values[half, :, 0] += 180
        out.append((Image.fromarray(values.astype(np.uint8)), "above" if i % 2 else "below"))
    return out


def image_folder(path: Path, splits: dict[str, int]) -> Path:
    """One folder of images for each class, in one folder for each split."""
    for seed, (split, count) in enumerate(splits.items()):
        for i, (image, label) in enumerate(image_rows(count, seed=seed)):
            (path / split / label).mkdir(parents=True, exist_ok=True)
            image.save(path / split / label / f"{i}.png")
    return path


def image_model(path: Path, kind: str = "vit") -> str:
    """A tiny image classifier's backbone and its processor."""
    if kind == "vit":
        config = hf.ViTConfig(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, image_size=16, patch_size=4,
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, initializer_range=LIVELY,
        )  # fmt: skip
        seeded(lambda: hf.ViTModel(config)).save_pretrained(path)
    else:
        config = hf.ResNetConfig(
            embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic"
        )
        seeded(lambda: hf.ResNetModel(config)).save_pretrained(path)
    hf.ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(path)
    return str(path)


def detector(path: Path, kind: str = "yolos", side: int = 32) -> str:
    """A tiny YOLOS, DETR or RT-DETR of seven classes, and its processor."""
    stages = hf.ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 16],
        depths=[1, 1],
        layer_type="basic",
        out_features=["stage2"],
    )
    if kind == "yolos":
        config = hf.YolosConfig(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, image_size=[side, side], patch_size=8,
            num_detection_tokens=5, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, initializer_range=LIVELY, num_labels=7,
        )  # fmt: skip
        seeded(lambda: hf.YolosForObjectDetection(config)).save_pretrained(path)
        hf.YolosImageProcessorPil(
            size={"height": side, "width": side}, do_pad=False
        ).save_pretrained(path)
    elif kind == "detr":  # pads a batch to its largest image
        config = hf.DetrConfig(
            use_timm_backbone=False, use_pretrained_backbone=False, backbone=None, backbone_config=stages, d_model=32, encoder_layers=1,
            decoder_layers=1, encoder_ffn_dim=48, decoder_ffn_dim=48, encoder_attention_heads=2, decoder_attention_heads=2, num_queries=5,
            num_labels=7, dropout=0.0,
        )  # fmt: skip
        seeded(lambda: hf.DetrForObjectDetection(config)).save_pretrained(path)
        hf.DetrImageProcessorPil(
            size={"shortest_edge": side, "longest_edge": 2 * side}
        ).save_pretrained(path)
    else:
        sizes = {"out_features": ["stage2", "stage3", "stage4"]}
        backbone = hf.RTDetrResNetConfig(
            embedding_size=8,
            hidden_sizes=[8, 8, 16, 16],
            depths=[1] * 4,
            layer_type="basic",
            **sizes,
        )
        config = hf.RTDetrConfig(
            backbone_config=backbone, encoder_in_channels=[8, 16, 16], encoder_hidden_dim=16, d_model=32, decoder_in_channels=[16] * 3,
            encoder_ffn_dim=32, decoder_ffn_dim=32, decoder_layers=1, num_queries=8, num_denoising=4, encoder_attention_heads=2,
            decoder_attention_heads=2, num_labels=7,
        )  # fmt: skip
        seeded(lambda: hf.RTDetrForObjectDetection(config)).save_pretrained(path)
        hf.RTDetrImageProcessorPil(size={"height": 64, "width": 64}).save_pretrained(path)
    return str(path)


def stable_diffusion(path: Path, xl: bool = False) -> str:
    """A tiny Stable Diffusion pipeline (or XL's): U-Net, VAE, text encoder, a tokenizer of single letters."""
    import diffusers

    letters = [
        *"abcdefghijklmnopqrstuvwxyz",
        *(f"{c}</w>" for c in "abcdefghijklmnopqrstuvwxyz"),
        "<|startoftext|>",
        "<|endoftext|>",
    ]
    words = path / "words"
    words.mkdir(parents=True)
    (words / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(letters)}))
    (words / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = hf.CLIPTokenizer(
        str(words / "vocab.json"), str(words / "merges.txt"), model_max_length=24
    )
    text = hf.CLIPTextConfig(
        vocab_size=len(letters), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=24, projection_dim=16, bos_token_id=len(letters) - 2, eos_token_id=len(letters) - 1,
    )  # fmt: skip
    more = {} if not xl else {
        "addition_embed_type": "text_time", "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 16 + 6 * 8,
    }  # fmt: skip
    unet = seeded(lambda: diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8, cross_attention_dim=64 if xl else 32,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), attention_head_dim=8, **more,
    ))  # fmt: skip
    vae = seeded(lambda: diffusers.AutoencoderKL(
        block_out_channels=(8, 16), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=4,
        latent_channels=4, sample_size=16,
    ))  # fmt: skip
    scheduler = diffusers.DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False)
    encoder = seeded(lambda: hf.CLIPTextModel(text))
    if xl:
        second = seeded(lambda: hf.CLIPTextModelWithProjection(text))
        pipe = diffusers.StableDiffusionXLPipeline(
            vae, encoder, second, tokenizer, tokenizer, unet, scheduler
        )
    else:
        pipe = diffusers.StableDiffusionPipeline(
            vae, encoder, tokenizer, unet, scheduler, None, None, requires_safety_checker=False
        )
    pipe.save_pretrained(path / "pipe")
    return str(path / "pipe")


def ddpm(path: Path) -> str:
    """A tiny unconditional diffusion pipeline for grey images of 16 x 16."""
    import diffusers

    unet = seeded(lambda: diffusers.UNet2DModel(
        sample_size=16, in_channels=1, out_channels=1, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"), attention_head_dim=8,
    ))  # fmt: skip
    diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler()).save_pretrained(path)
    return str(path)
