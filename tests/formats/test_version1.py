"""Files of version 1, written before version 2 existed: they load for ever."""

import pytest
import torch

from tests.formats.fakes import GOLDEN, config, put, rebuilt, same, small, tensor
from veratune.errors import AdapterFileError, BasisError
from veratune.formats import native

FILE = (GOLDEN / "version1.safetensors").read_bytes()


def test_golden_files_are_read():
    assert same(native.decode(FILE), small())
    half = native.read(GOLDEN / "version1-bfloat16.safetensors")
    assert same(half, small().to(torch.bfloat16))
    adapter = native.read(GOLDEN / "version1-head-conv.safetensors")
    assert adapter.ranks == {"x.q": 2, "y.q": 3}
    assert adapter.kernels == {"x.q": (2, 2)}
    assert adapter.d == {}
    assert torch.equal(adapter.b["y.q"], torch.tensor([0.5, -2.0, 0.0]))
    assert torch.equal(adapter.head["top.weight"], torch.arange(6.0).view(2, 3))
    assert adapter.head["top.count"] == 3


def test_written_again_it_is_version_2_with_the_same_content():
    assert same(native.decode(native.encode(native.decode(FILE))), small())


# Each of these has a right digest: the attacker knows the format.
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (put("basis", "0" * 32), BasisError, "its fingerprint differs"),
        (
            config(seed=1),
            BasisError,
            r"the basis drawn here \(seed 1, basis='random'\) is not the one",
        ),
        (config(init="kaiming_normal"), BasisError, "its fingerprint differs"),
        (config(sharing="unique"), BasisError, "its fingerprint differs"),
        (
            config(rank=3),
            AdapterFileError,
            r"layer 'x.q' \(4 -> 3\): the file has d of shape \(2,\), the config says rank 3",
        ),
        (config(rank=10**12), AdapterFileError, "at rank 1000000000000, which no layer has"),
        (config(rank="2"), AdapterFileError, "rank is '2'; it must be an integer"),
        (config(rnak=2), AdapterFileError, "unknown setting 'rnak'"),
        (config(targets=5), AdapterFileError, "targets is 5"),
        (config(vectors="d"), AdapterFileError, "b of layer 'x.q' is not expected"),
        (put("config", []), AdapterFileError, "its configuration is not valid|lacks or garbles"),
        (put("config", None), AdapterFileError, "lacks or garbles"),
        (put("shapes", [[3, 4]]), AdapterFileError, "vectors for 2 layers and shapes for 1"),
        (put("shapes", [[3, 4], [3, -4]]), AdapterFileError, "claims the size -4 -> 3"),
        (put("shapes", [[3, 4], [3, 10**15]]), AdapterFileError, "claims the size"),
        (put("shapes", [[3, 4], "ab"]), AdapterFileError, "lacks or garbles"),
        (put("shapes", 7), AdapterFileError, "lacks or garbles"),
        (put("base", {}), AdapterFileError, "lacks or garbles"),
        (put("base", {"id": "x", "probe": "!!!"}), AdapterFileError, "not base64"),
        (put("base", {"id": "x", "probe": "AAAA"}), AdapterFileError, "lacks or garbles"),
        (put("task", 3), AdapterFileError, "lacks or garbles"),
        (tensor("d/x.q", None), AdapterFileError, "d of layer 'x.q' is missing"),
        (tensor("e/x.q", torch.ones(2)), AdapterFileError, "tensor 'e/x.q' is neither d/<layer>"),
        (tensor("d/", torch.ones(2)), AdapterFileError, "tensor 'd/' is neither"),
        (tensor("d/x.q", torch.ones(2, dtype=torch.float64)), AdapterFileError, "is of dtype F64"),
        (tensor("d/x.q", torch.ones(2, dtype=torch.int32)), AdapterFileError, "is of dtype I32"),
        (tensor("d/x.q", torch.ones(2, 1)), AdapterFileError, r"d of shape \(2, 1\)"),
        (
            tensor("b/x.q", torch.full((3,), float("inf"))),
            AdapterFileError,
            "holds NaN or infinity",
        ),
        (
            tensor("head/top.weight", torch.ones(2)),
            AdapterFileError,
            "belongs to none of the config's heads",
        ),
    ],
)
def test_attacks_with_a_right_digest(change, error, message):
    with pytest.raises(error, match=message):
        native.decode(rebuilt(FILE, change))
