import hashlib
import json
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
from tests.formats.small import small
from veratune.adapter import Adapter
from veratune.errors import AdapterError, AdapterFileError, BasisError, VeratuneError
from veratune.formats import native

TOKENS = torch.arange(2, 26).view(3, 8)


def same(one: Adapter, two: Adapter) -> bool:
    def equal(a, b):
        return set(a) == set(b) and all(
            torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a
        )

    return (
        (one.config, dict(one.shapes), one.base_id, dict(one.task)) == (two.config, dict(two.shapes), two.base_id, dict(two.task))
        and equal(one.d, two.d) and equal(one.b, two.b) and equal(one.head, two.head)
        and (one.weight_fingerprint is two.weight_fingerprint or torch.equal(one.weight_fingerprint, two.weight_fingerprint))
    )  # fmt: skip


def rebuilt(data: bytes, change) -> bytes:
    """A file with consistent digest whose metadata or tensors were changed: what an attacker who knows the format writes."""
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    about, tensors = json.loads(header["__metadata__"]["veratune"]), safetensors.torch.load(data)
    change(about, tensors)
    about.pop("digest", None)
    return native._pack(about, {name: tensors[name].contiguous() for name in sorted(tensors)})


def test_golden_bytes():
    data = native.encode(small())
    assert (
        hashlib.sha256(data).hexdigest()
        == "0828996dd72317aae5ba0638cc652664de0c7da968c2cd345e2d83241fca9c68"
    )
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
        assert size <= 4 * values + 4096 + 230 * len(vt.extract(model).shapes)


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
        (safetensors.torch.save({"x": torch.ones(1)}, {"veratune": '{"version":2}'}), "its format version is 2; this veratune reads version 1"),
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


def put(key, value):
    def change(about, tensors):
        about[key] = value

    return change


def config(**entries):
    def change(about, tensors):
        about["config"] |= entries

    return change


def tensor(name, value):
    def change(about, tensors):
        tensors.pop(name, None)
        if value is not None:
            tensors[name] = value

    return change


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
        native.decode(rebuilt(native.encode(small()), change))


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
from tests.formats.small import small
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
