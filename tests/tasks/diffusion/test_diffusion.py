import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline
from torch import nn

import veratune as vt
from tests import fakes
from veratune.errors import DataError, UnsupportedError
from veratune.formats import native
from veratune.inference.adapted import load_with_adapter
from veratune.inference.evaluate import evaluate_with_base
from veratune.tasks.diffusion.models import Unconditional
from veratune.tasks.diffusion.pipelines import load_style
from veratune.training.run import train
from veratune.training.settings import TrainSettings

pytestmark = pytest.mark.filterwarnings("ignore")


class Zero(nn.Module):
    """Predicts nothing, so that the loss is the mean square of the target."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, x, t):
        return self.weight * x


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("gamma", [0.0, 5.0])
def test_the_loss_is_the_formula(kind, gamma):
    scheduler = DDPMScheduler(prediction_type=kind)
    model = Unconditional(Zero(), scheduler, 1, gamma).eval()
    x, index = torch.randn(3, 1, 4, 4), torch.tensor([3, 4, 5])
    total = 0.0
    for image, i in zip(x.double(), index, strict=True):
        drawn = torch.Generator().manual_seed(int(i))
        noise, t = (
            torch.randn(1, 4, 4, generator=drawn).double(),
            torch.randint(0, 1000, (), generator=drawn),
        )
        alpha = scheduler.alphas_cumprod[t].double()
        target = noise if kind == "epsilon" else alpha.sqrt() * noise - (1 - alpha).sqrt() * image
        snr = alpha / (1 - alpha)
        weight = (
            1.0 if not gamma else min(snr.item(), gamma) / (snr.item() + (kind == "v_prediction"))
        )
        total += weight * target.square().mean().item()
    assert model(x, index=index)["loss"].item() == pytest.approx(total / 3, rel=1e-4)
    assert torch.equal(model(x, index=index)["loss"], model(x, index=index)["loss"])
    model.train()
    assert not torch.equal(model(x, index=index)["loss"], model(x, index=index)["loss"])


def captioned(folder):
    folder.mkdir()
    for i, (image, name) in enumerate(fakes.image_rows(4, 32)):
        image.save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"red {name}")
    return str(folder)


def settings(model, data, out, **changes):
    base = {
        "model": model, "task": "text-to-image", "data": data, "eval_data": data, "eval_split": "train", "out": str(out), "epochs": 2,
        "lr": 5e-2, "batch_size": 4, "sample_steps": 2, "device": "cpu", "keep": "last", "preview": 0,
    }  # fmt: skip
    return TrainSettings(**(base | changes))


def test_a_pipeline_learns_captions_and_draws_with_the_file(tmp_path):
    model, data = fakes.stable_diffusion(tmp_path), captioned(tmp_path / "data")
    vera = vt.VeraConfig(rank=8, targets=["query", "value", "all-conv"])
    result = train(settings(model, data, tmp_path / "run", epochs=15, min_snr=5.0, ema=0.5), vera)
    assert result.after["loss"] < result.before["loss"]
    assert (
        len(list((tmp_path / "run" / "samples").glob("*.png"))) == 16
    )  # one before, one for each epoch
    layers = native.read(result.path).shapes
    assert all(name.startswith("unet.") for name in layers)
    assert "unet.conv_in" in layers
    assert "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_q" in layers
    pipe = StableDiffusionPipeline.from_pretrained(model)

    def drawn():
        pipe.set_progress_bar_config(disable=True)
        out = pipe(
            "red above",
            generator=torch.Generator().manual_seed(0),
            num_inference_steps=2,
            height=16,
            width=16,
            output_type="np",
        )
        return out.images

    plain = drawn()
    held = load_style(pipe, result.path)
    assert not np.allclose(drawn(), plain)
    vt.use(held, None)
    assert np.array_equal(drawn(), plain)
    vt.detach(held)
    assert np.array_equal(drawn(), plain)
    base, after = evaluate_with_base(
        load_with_adapter(model, result.path, device="cpu"), data, split="train"
    )
    assert after["loss"] == pytest.approx(result.after["loss"], rel=1e-4)
    assert base["loss"] == pytest.approx(result.before["loss"], rel=1e-4)


def test_xl_with_both_text_encoders(tmp_path):
    model, data = fakes.stable_diffusion(tmp_path, xl=True), captioned(tmp_path / "data")
    result = train(
        settings(model, data, tmp_path / "run", train_text_encoder=True), vt.VeraConfig(rank=4)
    )
    kinds = {name.split(".")[0] for name in native.read(result.path).shapes}
    assert kinds == {"unet", "text_encoder", "text_encoder_2"}
    held = load_with_adapter(model, result.path, device="cpu")
    assert held.task.train_text_encoder


def test_images_without_captions(tmp_path):
    model, data = fakes.ddpm(tmp_path / "ddpm"), fakes.image_folder(tmp_path / "data", {"train": 8})
    run = settings(model, str(data), tmp_path / "run", task="unconditional-image", eval_data=None)
    result = train(run, vt.VeraConfig(rank=4, targets=["all-conv", "all-linear"]))
    assert result.steps == 4
    assert (tmp_path / "run" / "samples" / "000004.png").is_file()


def test_what_is_no_pipeline_is_refused(tmp_path):
    data = captioned(tmp_path / "data")
    with pytest.raises(DataError, match="a folder without model_index.json"):
        train(
            settings(fakes.image_model(tmp_path / "vit"), data, tmp_path / "a"),
            vt.VeraConfig(rank=4),
        )
    with pytest.raises(
        UnsupportedError, match="is a DDPMPipeline; pipelines with a U-Net and a text encoder"
    ):
        train(settings(fakes.ddpm(tmp_path / "ddpm"), data, tmp_path / "b"), vt.VeraConfig(rank=4))
    model = fakes.stable_diffusion(tmp_path / "sd")
    with pytest.raises(UnsupportedError, match="quantize is for language models"):
        train(settings(model, data, tmp_path / "c", quantize="4bit"), vt.VeraConfig(rank=4))
    with pytest.raises(DataError, match="no column for text"):
        train(
            settings(model, str(fakes.image_folder(tmp_path / "n", {"train": 4})), tmp_path / "d"),
            vt.VeraConfig(rank=4),
        )


@pytest.mark.slow
def test_a_tiny_pipeline_overfits_a_caption_set(tmp_path):
    model, data = fakes.stable_diffusion(tmp_path), captioned(tmp_path / "data")
    vera = vt.VeraConfig(rank=64, targets=["all-conv", "all-linear"])
    result = train(
        settings(model, data, tmp_path / "run", epochs=200, lr=4e-2, save_steps=10**6), vera
    )
    assert result.after["loss"] < 0.7 * result.before["loss"]
