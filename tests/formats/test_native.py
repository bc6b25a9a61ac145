import dataclasses
import hashlib
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import veratune as vt
from tests import fakes
from tests.fakes import scramble
from tests.formats.fakes import config, put, rebuilt, same, small, tensor
from veratune.adapter import Adapter
from veratune.errors import AdapterError, AdapterFileError, BasisError, VeratuneError
from veratune.formats import native

TOKENS = torch.arange(2, 26).view(3, 8)


@pytest.mark.parametrize(
    ("storage", "digest"),
    [
        (None, "40ceea2ca10fde5ec25c8fcbb69ee378c4a2ca2efea2c7b814a157b9e145b644"),
        ("bfloat16", "b300b967293c8e855e23bedd36eb728a3cdf4ce3b986890c7135cdd1759cffc6"),
        ("int8", "050fa170485fe3196cf6b4e26878359a0b2c0d834009de6831f9f4898654afc4"),
    ],
)
def test_golden_bytes(storage, digest):
    data = native.encode(small(), storage)
    assert hashlib.sha256(data).hexdigest() == digest
    if storage is None:
        assert same(native.decode(data), small())


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 9), st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=4),
    st.sampled_from(["both", "d", "b"]), st.sampled_from(["float32", "bfloat16", "float16"]), st.booleans(),
)  # fmt: skip
def test_what_is_written_is_read(rank, shapes, vectors, dtype, head):
    names = {f"block.{i}.q": shape for i, shape in enumerate(shapes)}
    kind = getattr(torch, dtype)
    config = vt.VeraConfig(
        rank=rank,
        targets=["q"],
        vectors=vectors,
        dtype=dtype,
        head=["top"] if head else [],
        seed=2**64 - 1,
    )
    adapter = Adapter(
        config, names,
        {k: torch.randn(rank).to(kind) for k in names} if vectors != "b" else {},
        {k: torch.randn(m).to(kind) for k, (m, _) in names.items()} if vectors != "d" else {},
        head={"top.weight": torch.randn(2, 3), "top.count": torch.tensor(3)} if head else {},
    )  # fmt: skip
    data = native.encode(adapter)
    assert same(native.decode(data), adapter)
    assert native.encode(native.decode(data)) == data


def test_size_is_the_vectors_and_a_little(tmp_path):
    for settings_ in ({}, {"targets": "all-linear"}):
        model = vt.attach(fakes.llama(), vt.VeraConfig(rank=64, **settings_), "a")
        size, values = vt.save(model, tmp_path / "a.safetensors"), vt.count_trained(model, "a")
        assert size == (tmp_path / "a.safetensors").stat().st_size
        assert size <= 4 * values + 2048 + 100 * len(vt.extract(model).shapes)


def test_load_gives_the_saved_function_and_the_files_name(tmp_path):
    model = vt.attach(fakes.llama(), vt.VeraConfig(rank=8), "x")
    scramble(model, "x")
    vt.save(model, tmp_path / "alice.safetensors")
    other = fakes.llama()
    assert vt.load(other, tmp_path / "alice.safetensors") == "alice"
    torch.testing.assert_close(other(TOKENS).logits, model(TOKENS).logits)
    with pytest.raises(AdapterError, match="adapter 'alice' is attached already"):
        vt.load(other, tmp_path / "alice.safetensors")


def test_saving_while_merged_saves_the_adapter(tmp_path):
    model = vt.attach(fakes.llama(), vt.VeraConfig(rank=8), "x")
    scramble(model, "x")
    vt.save(model, tmp_path / "before.safetensors")
    vt.merge(model)
    vt.save(model, tmp_path / "after.safetensors")
    assert (tmp_path / "before.safetensors").read_bytes() == (
        tmp_path / "after.safetensors"
    ).read_bytes()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not a whole safetensors file"),
        (b"\x00" * 7, "not a whole safetensors file"),
        (b"\xff" * 64, "not a whole safetensors file"),
        ((2**63).to_bytes(8, "little") + b"{}", "not a whole safetensors file"),
        ((100_000_000).to_bytes(8, "little") + b"{" * 100, "not a whole safetensors file"),
        (safetensors.torch.save({"x": torch.ones(1)}), "has no 'veratune' metadata"),
        (safetensors.torch.save({"x": torch.ones(1)}, {"veratune": "{"}), "its metadata is not JSON"),
        (safetensors.torch.save({"x": torch.ones(1)}, {"veratune": "[" * 100_000}), "its metadata is not JSON"),
        (safetensors.torch.save({"x": torch.ones(1)}, {"veratune": "[]"}), "its format version is None"),
        (safetensors.torch.save({"x": torch.ones(1)}, {"veratune": '{"version":3}'}), "its format version is 3; this veratune reads versions 1 and 2"),
        (safetensors.torch.save({"x": torch.ones(1)}, {"veratune": '{"version":1}'}), "does not match its digest"),
        (native.encode(small())[:-5], "not a whole safetensors file"),
        (native.encode(small()) + b"more", "not a whole safetensors file"),
        (native.encode(small())[:-1] + b"\x00", "does not match its digest: it was damaged or tampered with"),
    ],
)  # fmt: skip
def test_malformed_files(data, message, tmp_path):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(data)
    with pytest.raises(AdapterFileError, match=message) as caught:
        native.read(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def index(*entries):
    return put("layers", list(entries))


X, Y = ["x.q", 3, 4, 2], ["y.q", 3, 4, 2]


# Each of these has a right digest: the attacker knows the format.
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (put("basis", "0" * 32), BasisError, "its fingerprint differs"),
        (config(seed=1), BasisError, r"\(seed 1, basis='random'\) is not the one"),
        (config(sharing="unique"), BasisError, "its fingerprint differs"),
        (config(rank="2"), AdapterFileError, "rank is '2'; it must be an integer"),
        (config(rnak=2), AdapterFileError, "unknown setting 'rnak'"),
        (config(vectors="d"), AdapterFileError, "tensor 'b' is not expected; .*vectors='d'"),
        (put("config", None), AdapterFileError, "lacks or garbles"),
        (put("later", 1), AdapterFileError, "has the unknown entry 'later'"),
        (index(X), AdapterFileError, r"tensor 'd' is of shape \(4,\); .* wants \(2,\)"),
        (index(), AdapterFileError, "its index of layers is empty"),
        (index(Y, X), AdapterFileError, "out of order"),
        (index(X, X), AdapterFileError, "has a layer twice"),
        (index(X, ["y.q", 3, 4, 10**12]), AdapterFileError, "at rank 1000000000000, which no"),
        (index(X, ["y.q", 3, -4, 2]), AdapterFileError, "claims the size -4 -> 3"),
        (index(X, ["y.q", 3, 4, 0]), AdapterFileError, "at rank 0, which no layer has"),
        (index(X, ["y.q", 3, 4, 2, 1, 1, 1, 1]), AdapterFileError, "has a kernel of"),
        (index(X, ["y.q", 3, 4]), AdapterFileError, "lacks or garbles"),
        (index(X, [7, 3, 4, 2]), AdapterFileError, "lacks or garbles"),
        (index(X, "abcd"), AdapterFileError, "lacks or garbles"),
        (put("layers", 7), AdapterFileError, "lacks or garbles"),
        (put("base", {}), AdapterFileError, "lacks or garbles"),
        (put("base", {"id": "x", "weights": "!!!"}), AdapterFileError, "not base64"),
        (put("base", {"id": "x", "weights": "AAAA"}), AdapterFileError, "lacks or garbles"),
        (put("task", 3), AdapterFileError, "lacks or garbles"),
        (tensor("d", None), AdapterFileError, "tensor 'd' is missing"),
        (tensor("e", torch.ones(2)), AdapterFileError, "tensor 'e' is neither d, b nor head/"),
        (tensor("d", torch.ones(4).double()), AdapterFileError, "tensor 'd' is of dtype F64"),
        (tensor("d", torch.ones(4).to(torch.int8)), AdapterFileError, "'d_scale' is of shape None"),
        (tensor("d_scale", torch.ones(1)), AdapterFileError, "'d_scale' is of shape"),
        (tensor("d", torch.ones(4, 1)), AdapterFileError, r"of shape \(4, 1\)"),
        (tensor("b", torch.full((6,), float("inf"))), AdapterFileError, "NaN or infinity"),
        (tensor("head/top.weight", torch.ones(2)), AdapterFileError, "none of the config's heads"),
    ],
)
def test_attacks_with_a_right_digest(change, error, message):
    with pytest.raises(error, match=message):
        native.decode(rebuilt(native.encode(small()), change))


def test_a_pattern_in_a_file_is_not_evaluated():
    slow = "re:(a+)+$"  # exponential in a backtracking engine
    data = rebuilt(native.encode(small()), config(rank_pattern={slow: 3}))
    assert native.decode(data).ranks == {"x.q": 2, "y.q": 2}


def test_a_reader_checks_each_file_though_the_header_is_cached():
    reader, data = native.AdapterReader(), native.encode(small())
    assert same(reader.decode(data), small())
    other = native.encode(dataclasses.replace(small(), d={k: v + 1 for k, v in small().d.items()}))
    assert torch.equal(reader.decode(other).d["x.q"], small().d["x.q"] + 1)
    with pytest.raises(AdapterFileError, match="does not match its digest"):
        reader.decode(data[:-1] + b"\x01")
    with pytest.raises(AdapterFileError, match="not a whole safetensors file"):
        reader.decode(data[:-1])


def mutated(data: bytes, rng: random.Random) -> bytes:
    out = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 8])):
        kind = rng.randrange(5)
        at = (
            rng.randrange(len(out) or 1)
            if rng.random() < 0.5
            else rng.randrange(min(len(out) or 1, 1800))
        )
        if kind == 0 and out:
            out[at] ^= 1 << rng.randrange(8)
        elif kind == 1 and out:
            out[at] = rng.randrange(256)
        elif kind == 2:
            del out[at : at + rng.randrange(1, 40)]
        elif kind == 3:
            out[at:at] = bytes(rng.randrange(256) for _ in range(rng.randrange(1, 20)))
        else:
            out = out[: rng.randrange(len(out) + 1)]
    return bytes(out)


def refuse_or_same(data: bytes, original: Adapter) -> str:
    try:
        found = native.decode(data)
    except VeratuneError as error:
        assert "\n" not in str(error)
        return "refused"
    assert same(found, original), (
        "a changed file was taken for a valid one that says something else"
    )
    return "same"


@pytest.mark.parametrize("count", [400, pytest.param(5000, marks=pytest.mark.slow)])
def test_mutated_files_are_refused_or_say_the_same(count):
    rng, original = (
        random.Random(count),
        vt.extract(scramble(vt.attach(fakes.llama(), vt.VeraConfig(rank=4), "a"), "a")),
    )
    data = native.encode(original)
    outcomes = [refuse_or_same(mutated(data, rng), original) for _ in range(count)]
    assert outcomes.count("refused") > 0.95 * count


WRITER = """
import sys, torch
from tests.formats.fakes import config, put, rebuilt, same, small, tensor
from veratune.formats import native
import dataclasses
adapters = [dataclasses.replace(small(), base_id=name) for name in ("old", "new")]
native.write(adapters[0], sys.argv[1])
print("ready", flush=True)
while True:
    for adapter in adapters:
        native.write(adapter, sys.argv[1])
"""


@pytest.mark.parametrize("count", [5, pytest.param(100, marks=pytest.mark.slow)])
def test_kill_in_the_middle_of_saving_leaves_the_old_file_or_the_new_one(count, tmp_path):
    path, seen = tmp_path / "a.safetensors", set()
    native.write(small(), path)
    rng = random.Random(0)
    for _ in range(count):
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(path)],
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
        assert process.stdout.readline() == b"ready\n"
        time.sleep(rng.uniform(0.002, 0.03))
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        seen.add(native.read(path).base_id)
    assert seen <= {"old", "new"}


def test_the_suffix_says_what_it_is(tmp_path):
    model = vt.attach(fakes.llama(), vt.VeraConfig(rank=4), "a")
    with pytest.raises(
        AdapterError, match=r"a.bin: an adapter's file is called something.safetensors"
    ):
        vt.save(model, tmp_path / "a.bin")


def test_sizes_of_a_small_language_models_adapter():
    """SmolLM2-135M, query and value at rank 256: 38,400 values in 60 layers."""
    shapes = {
        f"model.layers.{i}.self_attn.{name}_proj": (m, 576)
        for i in range(30)
        for name, m in (("q", 576), ("v", 192))
    }
    adapter = Adapter(
        vt.VeraConfig(rank=256),
        shapes,
        {layer: torch.randn(256) for layer in shapes},
        {layer: torch.randn(m) for layer, (m, _) in shapes.items()},
        base_id="SmolLM2-135M-Instruct",
        weight_fingerprint=torch.ones(64).bfloat16(),
    )
    assert adapter.trained_values == 38_400
    assert len(native.encode(adapter)) < 160_000
    assert len(native.encode(adapter, "bfloat16")) < 83_000
    assert len(native.encode(adapter, "int8")) < 46_000
