"""LoRA files for image programs: diffusers loads them and draws the same image."""

import pytest
import safetensors.torch
import torch

import veratune as vt
from tests import fakes
from tests.fakes import scramble
from veratune.errors import UnsupportedError
from veratune.formats.export import export

diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.filterwarnings("ignore")
TARGETS = ["to_q", "to_v", "fc1", "conv1", "conv_in"]


def drawn(pipe):
    return pipe(
        "a cat", num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="np"
    ).images


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return fakes.stable_diffusion(tmp_path_factory.mktemp("sd"))


def pipeline(folder):
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


# diffusers 0.42 drops kohya's names of the text encoder's attention with transformers 5: not for
# lack of them in the file, see test_kohyas_names.
@pytest.mark.parametrize(("style", "more"), [("diffusers", ["q_proj"]), ("kohya", [])])
def test_diffusers_draws_the_same_image(folder, style, more, tmp_path):
    from veratune.cli.base_models import empty_base
    from veratune.tasks.diffusion.models import TextToImageModel

    pipe = pipeline(folder)
    plain = drawn(pipe)
    model = TextToImageModel(pipe, text_encoder=True)
    vt.attach(model, vt.VeraConfig(rank=4, targets=[*TARGETS, *more]), "a")
    adapter = vt.extract(scramble(model, "a"))
    assert {layer.partition(".")[0] for layer in adapter.shapes} == {"unet", "text_encoder"}
    assert adapter.kernels
    wanted = drawn(pipe)
    export(adapter, style, tmp_path / "style.safetensors", model=empty_base(folder))
    theirs = pipeline(folder)
    theirs.load_lora_weights(str(tmp_path / "style.safetensors"))
    found = drawn(theirs)
    assert abs(wanted - plain).max() > 1e-2
    assert abs(found - wanted).max() < 1e-4


def test_kohyas_names(folder, tmp_path):
    from veratune.tasks.diffusion.models import TextToImageModel

    model = TextToImageModel(pipeline(folder), text_encoder=True)
    targets = ["to_q", "q_proj", "text_encoder.encoder.layers.0.self_attn.out_proj"]
    vt.attach(model, vt.VeraConfig(rank=4, targets=targets), "a")
    export(vt.extract(model), "kohya", tmp_path / "x.safetensors")
    tensors = safetensors.torch.load_file(tmp_path / "x.safetensors")
    for layer in (
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q",
        "lora_te_text_model_encoder_layers_1_self_attn_q_proj",
        "lora_te_text_model_encoder_layers_0_self_attn_out_proj",
    ):
        assert tensors[f"{layer}.lora_down.weight"].shape[0] == 4
        assert tensors[f"{layer}.lora_up.weight"].shape[1] == 4
        assert tensors[f"{layer}.alpha"] == 4


def test_layers_of_other_models_are_refused(tmp_path):
    adapter = vt.extract(vt.attach(fakes.llama(), vt.VeraConfig(rank=2), "a"))
    with pytest.raises(UnsupportedError, match="is not of a U-Net or a text encoder"):
        export(adapter, "kohya", tmp_path / "x.safetensors")
    assert not (tmp_path / "x.safetensors").exists()
