"""VeraLightningCallback: checkpoints hold the trained tensors alone, and Lightning resumes."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import veratune as vt
from tests import fakes
from veratune.formats import native

lightning = pytest.importorskip("lightning", reason="needs lightning (the extra lightning)")
pytestmark = pytest.mark.filterwarnings("ignore")


class Module(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.model = vt.attach(fakes.perceptron(), vt.VeraConfig(rank=4, targets=("all-linear",)))

    def training_step(self, batch, index):
        x, y = batch
        return nn.functional.mse_loss(self.model(x), y)

    def configure_optimizers(self):
        trained = [p for p in self.parameters() if p.requires_grad]
        return torch.optim.AdamW(trained, lr=0.05)


def fit(module, folder, steps, checkpoint=None):
    from veratune.integrations.lightning import VeraLightningCallback

    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(16, n, generator=generator) for n in (12, 6))
    trainer = lightning.Trainer(
        max_steps=steps, accelerator="cpu", logger=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=folder, num_sanity_val_steps=0,
        callbacks=[VeraLightningCallback(module.model, folder / "adapter.safetensors")],
    )  # fmt: skip
    loader = DataLoader(TensorDataset(x, y), batch_size=4)
    trainer.fit(module, loader, ckpt_path=checkpoint, weights_only=True)
    trainer.save_checkpoint(folder / "last.ckpt")
    return module


class Resumed(Module):
    """Keeps the adapter that it starts training with."""

    def on_train_start(self):
        self.start = vt.extract(self.model)


def test_checkpoints_are_small_and_resume(tmp_path):
    half = fit(Module(), tmp_path, 4)
    stored = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert set(stored) == {name for name, p in half.named_parameters() if p.requires_grad}
    file = native.read(tmp_path / "adapter.safetensors")
    resumed = fit(Resumed(), tmp_path, 6, tmp_path / "last.ckpt")
    for adapter in (file, resumed.start):
        wanted = vt.extract(half.model)
        assert all(torch.equal(adapter.b[name], wanted.b[name]) for name in wanted.b)
        assert all(torch.equal(adapter.d[name], wanted.d[name]) for name in wanted.d)
    assert resumed.global_step == 6
