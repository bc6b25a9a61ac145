import os
from pathlib import Path

import pytest
import safetensors.torch
import torch

from veratune.errors import DataError
from veratune_lab.paper.networks import DDPM, CifarResNet, CifarViT, load_weights

DATA = Path(os.environ.get("VERATUNE_DATA", Path(__file__).parents[3] / "shared" / "data"))


@pytest.mark.parametrize(
    ("net", "values"), [(CifarResNet(3), 269_722), (CifarResNet(9), 853_018), (CifarViT(), 811_146)]
)
def test_cifar_networks_have_the_published_sizes(net, values):
    assert sum(p.numel() for p in net.parameters()) == values
    assert net.eval()(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def test_the_ddpm_has_the_published_size():
    net = DDPM()
    assert sum(p.numel() for p in net.parameters()) == 606_852
    assert net(torch.zeros(2, 1, 28, 28), torch.tensor([0, 999])).shape == (2, 1, 28, 28)


def test_weights_that_do_not_fit_are_named(tmp_path):
    safetensors.torch.save_file(CifarResNet(3).state_dict(), tmp_path / "model.safetensors")
    assert isinstance(load_weights(CifarResNet(3), tmp_path), CifarResNet)
    with pytest.raises(DataError, match="model.safetensors: not the weights of CifarResNet"):
        load_weights(CifarResNet(9), tmp_path)
    with pytest.raises(DataError, match="not the weights of DDPM"):
        load_weights(DDPM(), tmp_path / "nowhere.safetensors")


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "n", "least"), [("cifar_resnet20", 3, 0.90), ("cifar_resnet56", 9, 0.91)]
)
def test_published_weights_score_what_they_should(name, n, least):
    from veratune_lab.paper.nets import NetworkTask

    models, rows = DATA.parent / "models" / name, DATA / "cifar10"
    if not models.is_dir() or not rows.is_dir():
        pytest.skip("no CIFAR-10 data and checkpoints beside the repository")
    net = load_weights(CifarResNet(n), models).eval()
    task = NetworkTask(lambda classes: net, lambda net: [], 32)
    test = task.load_examples(str(rows / "test_1k.parquet"))
    task.fit_labels(test)
    encoded = task.encode(test, task.load_processor(""))
    batch = encoded[:1000]
    with torch.no_grad():
        guess = net(torch.stack(batch["pixel_values"])).argmax(-1)
    assert (guess == torch.tensor(batch["labels"])).float().mean() >= least
