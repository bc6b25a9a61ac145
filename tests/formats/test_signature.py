"""Signatures: right key and content pass, anything else is one line."""

import subprocess

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from tests.formats.fakes import small
from tests.formats.keys import write_pair
from veratune.errors import AdapterFileError, ConfigError
from veratune.formats import native, signature


@pytest.fixture
def signed(tmp_path):
    path = tmp_path / "a.safetensors"
    native.write(small(), path)
    private, public = write_pair(tmp_path, "ann")
    assert signature.sign(path, private) == tmp_path / "a.safetensors.sig"
    return path, public


def test_the_right_key_and_content_pass(signed):
    signature.verify(*signed)


def test_another_key_or_content_fails(signed, tmp_path):
    path, public = signed
    _, other = write_pair(tmp_path, "bob")
    with pytest.raises(
        AdapterFileError, match="the signature is not by .*bob.pub, or the file was"
    ):
        signature.verify(path, other)
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(AdapterFileError, match="changed after signing"):
        signature.verify(path, public)
    sig = tmp_path / "a.safetensors.sig"
    sig.write_text("!!!")
    with pytest.raises(AdapterFileError, match="not a base64 signature"):
        signature.verify(path, public)
    sig.unlink()
    with pytest.raises(AdapterFileError, match="a.safetensors.sig: no signature"):
        signature.verify(path, public)


def test_other_keys_are_refused(signed, tmp_path):
    path, public = signed
    private, exchange = write_pair(tmp_path, "x", X25519PrivateKey)
    with pytest.raises(ConfigError, match="an Ed25519 key is wanted"):
        signature.verify(path, exchange)
    with pytest.raises(ConfigError, match="an Ed25519 key is wanted"):
        signature.sign(path, private)
    with pytest.raises(ConfigError, match="not a PEM private key"):
        signature.sign(path, public)
    with pytest.raises(ConfigError, match="the key cannot be read"):
        signature.sign(path, tmp_path / "none.pem")


def test_keys_of_openssl_work(signed, tmp_path):
    path, _ = signed
    private, public = tmp_path / "o.pem", tmp_path / "o.pub"
    try:
        subprocess.run(["openssl", "genpkey", "-algorithm", "ed25519", "-out", private], check=True)
    except FileNotFoundError:
        pytest.skip("openssl is not installed")
    subprocess.run(["openssl", "pkey", "-in", private, "-pubout", "-out", public], check=True)
    signature.sign(path, private)
    signature.verify(path, public)
