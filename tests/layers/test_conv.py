"""VeraConv in four parts: the float64 reference, its merged form, the identity at the start, bad input."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import veratune as vt
from tests.fakes import scramble
from veratune.errors import BaseModelError, ConfigError, ShapeError, TargetError, UnsupportedError
from veratune.model_state import vectors_of
from veratune.ops.conv import vera_conv
from veratune.ops.delta import delta_weight

KINDS = {
    (1, False): nn.Conv1d, (2, False): nn.Conv2d, (3, False): nn.Conv3d,
    (1, True): nn.ConvTranspose1d, (2, True): nn.ConvTranspose2d, (3, True): nn.ConvTranspose3d,
}  # fmt: skip
PLANS = ["auto", "factored", "merged", "dense"]


def build(layer, dtype=torch.float64, **config):
    model = nn.Sequential(layer).to(dtype)
    return vt.attach(model, vt.VeraConfig(**{"rank": 3, "targets": ["0"], **config}), "a")


def by_hand(layer, m, n, delta):
    """ΔW (m, n) as the layer stores its weight, entry by entry."""
    out = torch.zeros_like(layer.weight)
    groups, kernel = layer.groups, layer.kernel_size
    for o in range(layer.out_channels):
        for i in range(layer.in_channels // groups):
            for place in (
                torch.cartesian_prod(*(torch.arange(k) for k in kernel))
                .view(-1, len(kernel))
                .tolist()
            ):
                column = i * math.prod(kernel) + sum(
                    p * math.prod(kernel[a + 1 :]) for a, p in enumerate(place)
                )
                if layer.transposed:
                    group, own = divmod(o, layer.out_channels // groups)
                    out[(group * (layer.in_channels // groups) + i, own, *place)] = delta[o, column]
                else:
                    out[(o, i, *place)] = delta[o, column]
    return out


@st.composite
def convolutions(draw):
    """Any convolution, with an input."""
    dims, transposed = draw(st.integers(1, 3)), draw(st.booleans())
    groups = draw(st.sampled_from([1, 2, 3]))
    inside, outside = groups * draw(st.integers(1, 2)), groups * draw(st.integers(1, 3))
    kernel, stride, dilation = (
        tuple(draw(st.integers(1, 2 if dims == 3 else 3)) for _ in range(dims)) for _ in range(3)
    )
    options = {
        "stride": stride,
        "dilation": dilation,
        "groups": groups,
        "bias": draw(st.booleans()),
    }
    if not transposed:
        options |= {
            "padding": draw(st.integers(0, 2)),
            "padding_mode": draw(st.sampled_from(["zeros", "reflect", "circular"])),
        }
    torch.manual_seed(0)
    layer = KINDS[dims, transposed](inside, outside, kernel, **options).double()
    x = torch.randn(2, inside, *(draw(st.integers(8, 9)) for _ in range(dims)), dtype=torch.float64)
    return layer, x


@settings(max_examples=60)
@given(
    convolutions(),
    st.sampled_from(PLANS),
    st.sampled_from(["random", "monarch"]),
    st.sampled_from(["both", "d", "b"]),
)
def test_equals_the_float64_reference_its_merged_form_and_the_base_at_the_start(
    case, plan, basis, vectors
):
    layer, x = case
    weight = layer.weight.detach().clone()
    y0 = layer(x)
    model = build(layer, plan=plan, basis=basis, vectors=vectors)
    if vectors != "b":
        torch.testing.assert_close(model(x), y0)
    (v,) = vectors_of(scramble(model, "a"), "a")
    m, n = v.part.out_features, v.part.in_features
    assert (m, n) == (
        layer.out_channels,
        layer.in_channels // layer.groups * math.prod(layer.kernel_size),
    )
    delta = by_hand(layer, m, n, v.delta_weight(x.device, torch.float64).detach())
    layer.weight.data = weight + delta
    wanted = layer(x)
    layer.weight.data = weight.clone()
    y = model(x)
    torch.testing.assert_close(y, wanted)
    vt.merge(model)
    torch.testing.assert_close(layer.weight, weight + delta)
    torch.testing.assert_close(model(x), y)
    vt.unmerge(model)
    assert torch.equal(layer.weight, weight)


@settings(max_examples=20)
@given(convolutions(), st.sampled_from(["factored", "dense"]))
def test_plans_have_the_gradients_of_the_merged_one(case, plan):
    layer, x = case
    grads = []
    for own in ("merged", plan):
        model = scramble(build(layer, plan=own), "a")
        x = x.detach().requires_grad_()
        model(x).square().sum().backward()
        grads.append([x.grad, *(p.grad for v in vectors_of(model, "a") for p in v.parameters())])
        vt.detach(model)
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("inside", "outside", "kernel", "groups"),
    [(4, 6, 3, 1), (4, 6, 1, 1), (4, 8, 3, 2), (3, 3, 5, 1)],
)
def test_the_layout_of_loralib(inside, outside, kernel, groups):
    layer = nn.Conv2d(inside, outside, kernel, groups=groups, padding=1)
    model = scramble(build(layer, torch.float32, rank=2, conv_layout="loralib"), "a")
    (v,) = vectors_of(model, "a")
    assert (v.d.shape, v.b.shape) == ((2 * kernel,), (outside // groups * kernel,))
    x = torch.randn(2, inside, 7, 7)
    A, B = v.pair(x.device, torch.float32)
    delta = delta_weight(A, B, v.d, v.b, v.scale).view(
        layer.weight.shape
    )  # as loralib: (B @ A).view(weight.shape)
    wanted = nn.functional.conv2d(x, layer.weight + delta, layer.bias, padding=1, groups=groups)
    torch.testing.assert_close(model(x), wanted, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), wanted, rtol=1e-4, atol=1e-5)
    low = model.train().bfloat16()(x.bfloat16())
    assert (low.float() - wanted).norm() <= 3e-2 * wanted.norm()


def test_loralib_has_no_matrix_for_other_convolutions():
    for layer in (nn.Conv1d(2, 2, 3), nn.Conv2d(2, 2, (1, 3)), nn.ConvTranspose2d(2, 2, 3)):
        with pytest.raises(
            UnsupportedError,
            match="conv_layout='loralib' is made for Conv2d with square kernels, not for a Conv",
        ):
            build(layer, conv_layout="loralib")
    model = build(nn.Conv2d(2, 2, 3), conv_layout="loralib", plan="factored", rank=1)
    with pytest.raises(UnsupportedError, match="plan='factored', but the factors of layer '0'"):
        model(torch.ones(1, 2, 4, 4, dtype=torch.float64))


class Net(nn.Module):
    """Many shapes, depthwise and pointwise, a linear head."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.pointwise = nn.Conv2d(8, 12, 1)
        self.fc = nn.Linear(12, 5)

    def forward(self, x):
        for layer in (self.stem, self.depthwise, self.pointwise):
            x = torch.relu(layer(x))
        return self.fc(x.mean((2, 3)))


def net(name="a", **config):
    model = vt.attach(
        Net().eval(), vt.VeraConfig(**{"rank": 4, "targets": ["all-conv"], **config}), name
    )
    return scramble(model, name, seed=len(name))


def test_one_basis_for_a_net_of_many_shapes_and_words_for_targets():
    model = net()
    assert [v.layer for v in vectors_of(model, "a")] == ["stem", "depthwise", "pointwise"]
    assert len({id(v.basis) for v in vectors_of(model, "a")}) == 1
    model = net(seed=1234567)
    assert vectors_of(model, "a")[0].basis.allocated_bytes() == 4 * (4 * 27 + 12 * 4)
    assert len(vectors_of(net(targets=["all-conv", "fc"]), "a")) == 4
    with pytest.raises(TargetError, match="'all-linear' matches no layer of Net"):
        net(targets=["all-conv", "all-linear"])  # its only linear layer is the output head
    assert len(vectors_of(net(targets=["fc", "pointwise"]), "a")) == 2
    with pytest.raises(
        TargetError, match="target 'pointwize' matches no layer of Net; did you mean 'pointwise'"
    ):
        net(targets=["pointwize"])


def test_mixed_rows_channels_last_and_training():
    model, x = net(), torch.randn(5, 3, 9, 9)
    scramble(
        vt.attach(model, vt.VeraConfig(rank=2, targets=["stem", "fc"], seed=5), "bb"), "bb", seed=1
    )
    names = ["a", "bb", None, "a", "bb"]
    with vt.rows(model, names):
        mixed = model(x)
    for i, name in enumerate(names):
        vt.use(model, name)
        torch.testing.assert_close(mixed[i], model(x[i : i + 1])[0], rtol=1e-4, atol=1e-5)
    y = model(x)
    last = model.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))
    torch.testing.assert_close(last, y, rtol=1e-4, atol=1e-5)
    vt.use(model, "a")
    optimizer = torch.optim.AdamW(
        [p for v in vectors_of(model, "a") for p in v.parameters()], lr=5e-2
    )
    losses = []
    for _ in range(60):
        loss = nn.functional.cross_entropy(model.train()(x), torch.arange(5))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1


@pytest.mark.parametrize("layout", ["matrix", "loralib"])
def test_into_a_file_and_back(layout, tmp_path):
    model, x = net(conv_layout=layout), torch.randn(2, 3, 9, 9)
    vt.save(model, tmp_path / "a.safetensors")
    again = Net().eval()
    vt.load(again, tmp_path / "a.safetensors")
    torch.testing.assert_close(again(x), model(x), rtol=1e-4, atol=1e-5)
    if layout == "loralib":
        return
    other = Net()
    other.depthwise = nn.Conv2d(
        8, 8, (9, 1), padding=(4, 0), groups=8, bias=False
    )  # as many values in another form
    with pytest.raises(
        BaseModelError,
        match="layer 'depthwise' is a convolution with a kernel of 3 x 3 in the file and .* 9 x 1 in Net",
    ):
        vt.load(other, tmp_path / "a.safetensors")


def test_hooks_dropout_autocast_and_forced_plans():
    x = torch.randn(2, 3, 9, 9)
    model = net()
    wanted = model(x)
    seen = []
    model.stem.base.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    torch.testing.assert_close(model(x), wanted, rtol=1e-4, atol=1e-5)
    assert seen == [(2, 8, 5, 5)]
    with torch.autocast("cpu", torch.bfloat16):
        low = model(x)
    assert (low.float() - wanted).norm() <= 5e-2 * wanted.norm()
    dropping = net(dropout=0.5)
    torch.testing.assert_close(dropping(x), wanted, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(dropping.train()(x), dropping(x))
    with pytest.raises(
        ConfigError, match="plan='projected' is for linear layers, but convolutions are adapted too"
    ):
        net(plan="projected")
    with pytest.raises(
        UnsupportedError,
        match="plan='merged' puts ΔW into the weight of layer 'stem', but it is torch.bfloat16",
    ):
        net(plan="merged").bfloat16()(x.bfloat16())


def test_bad_input_is_refused_with_the_sizes():
    A, B = torch.ones(2, 10), torch.ones(4, 2)
    with pytest.raises(ShapeError) as caught:
        vera_conv(
            torch.ones(1, 1, 5, 5), A, B, None, None, convolve=nn.functional.conv2d, kernel=(3, 3)
        )
    assert (
        str(caught.value)
        == "A (2, 10) does not fit; A is (r, in / groups * 9) for the kernel (3, 3)"
    )


class Same(nn.Conv2d):
    """Pads to the size of its input itself, and multiplies its weight."""

    def forward(self, x):
        return nn.functional.conv2d(nn.functional.pad(x, (1, 1, 1, 1)), 2 * self.weight, self.bias)


def test_a_convolution_with_a_forward_of_its_own_is_called_with_the_merged_weight():
    torch.manual_seed(0)
    model = nn.Sequential(Same(2, 3, 3), nn.Conv2d(3, 3, 1))
    x = torch.randn(2, 2, 5, 5)
    plain = model(x)
    vt.attach(model, vt.VeraConfig(rank=2, targets=["0"]))
    assert torch.equal(model(x), plain)
    scramble(model, "default")
    wanted = model[1](
        nn.functional.conv2d(
            nn.functional.pad(x, (1, 1, 1, 1)),
            2 * model[0].merged_weights("default")["weight"],
            model[0].bias,
        )
    )
    torch.testing.assert_close(model(x), wanted)
    with vt.rows(model, ["default", None]):
        mixed = model(x)
    torch.testing.assert_close(mixed, torch.stack([wanted[0], plain[1]]))
    model(x).square().sum().backward()
    assert model[0].vera["default"]["whole"].d.grad.abs().sum() > 0
    vt.merge(model)
    torch.testing.assert_close(model(x), wanted)
    assert torch.equal(vt.detach(model)(x), plain)


def test_what_a_convolution_with_a_forward_of_its_own_cannot_do_is_refused():
    with pytest.raises(
        UnsupportedError,
        match="layer '0' is a Same, a convolution with a forward of its own.*plan='factored'",
    ):
        build(Same(2, 3, 3), plan="factored")
    with pytest.raises(UnsupportedError, match="dropout=0.5 needs an input of the adapter alone"):
        build(Same(2, 3, 3), dropout=0.5)
    model = vt.attach(nn.Sequential(Same(2, 3, 3)).bfloat16(), vt.VeraConfig(rank=2, targets=["0"]))
    with pytest.raises(
        UnsupportedError, match="a weight of torch.bfloat16, too coarse to take ΔW in"
    ):
        model(torch.randn(1, 2, 5, 5).bfloat16())
