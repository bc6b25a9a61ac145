"""A trained LoRA as a basis: it starts exactly there, under every tool's names."""

import copy

import peft
import pytest
import safetensors.torch
import torch
from torch import nn

import veratune as vt
from veratune.basis.lora import LoraBasis
from veratune.errors import (
    AdapterFileError,
    BaseModelError,
    BasisError,
    ConfigError,
    TargetError,
    UnsupportedError,
)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv_in = nn.Conv2d(3, 8, 3, padding=1)
        self.down = nn.ModuleDict(
            {"conv": nn.Conv2d(8, 8, 3, stride=2, padding=1), "to_q": nn.Linear(8, 6)}
        )

    def forward(self, x):
        return self.down["to_q"](self.down["conv"](self.conv_in(x)).mean((2, 3)))


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net()


LAYERS = {"conv_in": 3, "down.conv": 3, "down.to_q": 2}


@pytest.fixture
def trained(net, tmp_path):
    """(output of PEFT's model, its folder): a LoRA of mixed ranks with alpha 6."""
    config = peft.LoraConfig(
        r=3,
        lora_alpha=6,
        target_modules=list(LAYERS),
        rank_pattern={"down.to_q": 2},
        init_lora_weights=False,
    )
    model = peft.get_peft_model(copy.deepcopy(net), config)
    x = torch.randn(2, 3, 6, 6)
    model.save_pretrained(tmp_path / "lora")
    return x, model(x).detach(), tmp_path / "lora"


def other_names(folder, file, rename, alpha=None):
    stored = safetensors.torch.load_file(folder / "adapter_model.safetensors")
    out = {}
    for key, value in stored.items():
        layer, _, side = key.removeprefix("base_model.model.").rpartition(".lora_")
        out[rename(layer, side[0])] = value
        if alpha:
            out[alpha(layer)] = torch.tensor(6.0)
    safetensors.torch.save_file(out, file)
    return file


FORMS = {
    "kohya": (
        lambda layer, side: f"lora_unet_{layer.replace('.', '_')}.lora_{'down' if side == 'A' else 'up'}.weight",
        lambda layer: f"lora_unet_{layer.replace('.', '_')}.alpha",
    ),
    "diffusers": (lambda layer, side: f"unet.{layer}.lora_{side}.weight", lambda layer: f"unet.{layer}.alpha"),
    "older diffusers": (
        lambda layer, side: f"unet.{layer}.lora.{'down' if side == 'A' else 'up'}.weight", lambda layer: f"unet.{layer}.alpha",
    ),
}  # fmt: skip


@pytest.mark.parametrize("form", ["peft", *FORMS])
def test_it_starts_exactly_at_the_lora(net, trained, tmp_path, form):
    x, wanted, folder = trained
    path = (
        folder if form == "peft" else other_names(folder, tmp_path / "x.safetensors", *FORMS[form])
    )
    basis = vt.read_lora(path, net)
    assert basis.ranks() == LAYERS
    plain = net(x)
    model = vt.attach(net, vt.VeraConfig(basis="lora"), basis=basis)
    torch.testing.assert_close(model(x), wanted, rtol=1e-5, atol=1e-5)
    assert vt.count_trained(model, "default") == 3 + 8 + 3 + 8 + 2 + 6
    vt.merge(model)
    torch.testing.assert_close(model(x), wanted, rtol=1e-5, atol=1e-5)
    assert torch.equal(vt.detach(model)(x), plain)


def test_a_pipeline_that_holds_the_network_is_understood(net, trained, tmp_path):
    _, _, folder = trained
    file = other_names(folder, tmp_path / "x.safetensors", *FORMS["kohya"])
    assert vt.read_lora(file, nn.ModuleDict({"unet": net})).ranks() == {
        f"unet.{name}": rank for name, rank in LAYERS.items()
    }


def test_many_pairs_of_vectors_over_one_lora_each_in_a_file(net, trained, tmp_path):
    x, wanted, folder = trained
    basis = vt.read_lora(folder, net)
    for name, targets in (("one", None), ("two", ["to_q"])):
        vt.attach(net, vt.VeraConfig(basis="lora", targets=targets), name, basis=basis)
        for vector in net.down["to_q"].vera[name]["whole"].parameters():
            nn.init.normal_(vector, 1.0, 0.5)
        vt.save(net, tmp_path / f"{name}.safetensors", name)
    outputs = {}
    for name in ("one", "two"):
        vt.use(net, name)
        outputs[name] = net(x)
    with vt.rows(net, ["one", "two"]):
        mixed = net(x)
    torch.testing.assert_close(mixed, torch.stack([outputs["one"][0], outputs["two"][1]]))
    vt.detach(net)
    for name in ("one", "two"):
        vt.load(net, tmp_path / f"{name}.safetensors", basis=vt.read_lora(folder, net))
        torch.testing.assert_close(net(x), outputs[name])
    assert not torch.allclose(outputs["one"], wanted)
    assert (tmp_path / "two.safetensors").stat().st_size < 1500


def test_the_lora_must_be_given_and_be_the_same(net, trained, tmp_path):
    _, _, folder = trained
    basis = vt.read_lora(folder, net)
    vt.attach(net, vt.VeraConfig(basis="lora"), basis=basis)
    vt.save(net, tmp_path / "a.safetensors")
    vt.detach(net)
    with pytest.raises(BasisError, match="trained over a LoRA, which it does not hold"):
        vt.load(net, tmp_path / "a.safetensors")
    other = LoraBasis({name: (A + 1, B) for name, (A, B) in basis.pairs.items()})
    with pytest.raises(BasisError, match="over another LoRA than the one that was given"):
        vt.load(net, tmp_path / "a.safetensors", basis=other)
    with pytest.raises(ConfigError, match="config.basis is 'lora' and attach was given no LoRA"):
        vt.attach(net, vt.VeraConfig(basis="lora"))
    with pytest.raises(ConfigError, match="config.basis is 'random' and attach was given a LoRA"):
        vt.attach(net, vt.VeraConfig(targets=["to_q"]), basis=basis)
    assert not vt.adapters(net)


def test_a_lora_that_does_not_fit_is_refused_with_its_layer(net, trained, tmp_path):
    _, _, folder = trained
    with pytest.raises(BaseModelError, match="the LoRA has layer 'conv_in', Sequential has not"):
        vt.read_lora(folder, nn.Sequential(nn.Conv2d(3, 8, 3)))
    basis = vt.read_lora(folder, net)
    net.down["to_q"] = nn.Linear(9, 6)
    with pytest.raises(BaseModelError, match="layer 'down.to_q' is 8 -> 6 in it and 9 -> 6 in Net"):
        vt.attach(net, vt.VeraConfig(basis="lora"), basis=basis)
    small = LoraBasis({"down.conv": basis.pairs["down.conv"]})
    with pytest.raises(
        TargetError, match="layer 'conv_in' is a target, but the LoRA has no matrices for it"
    ):
        vt.attach(net, vt.VeraConfig(basis="lora", targets=["conv_in"]), basis=small)
    with pytest.raises(
        ConfigError,
        match="basis='lora' takes its matrices from a LoRA, so sharing='unique' has no meaning",
    ):
        vt.VeraConfig(basis="lora", sharing="unique")


def test_damaged_files_are_refused(net, tmp_path):
    def written(**tensors):
        safetensors.torch.save_file(
            {k.replace("__", "."): v for k, v in tensors.items()}, tmp_path / "x.safetensors"
        )
        return tmp_path / "x.safetensors"

    A, B = torch.ones(2, 8), torch.ones(6, 2)
    with pytest.raises(AdapterFileError, match="layer 'down.to_q' has no B"):
        vt.read_lora(written(down__to_q__lora_A__weight=A), net)
    with pytest.raises(UnsupportedError, match="it has DoRA's magnitudes; only plain LoRA pairs"):
        vt.read_lora(
            written(down__to_q__lora_A__weight=A, down__to_q__lora_magnitude_vector=B), net
        )
    with pytest.raises(AdapterFileError, match="holds NaN or infinity"):
        vt.read_lora(
            written(down__to_q__lora_A__weight=A * float("nan"), down__to_q__lora_B__weight=B), net
        )
    (tmp_path / "x.safetensors").write_bytes(b"nothing")
    with pytest.raises(AdapterFileError, match="not a whole safetensors file"):
        vt.read_lora(tmp_path / "x.safetensors", net)
    with pytest.raises(
        AdapterFileError, match="no PEFT checkpoint: adapter_config.json: No such file"
    ):
        vt.read_lora(tmp_path, net)
