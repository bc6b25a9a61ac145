"""A key opens its tenants, no other key does, and the file may change under a running server."""

import json

import hypothesis
import pytest
from hypothesis import strategies

from veratune.errors import ConfigError, InvalidNameError
from veratune.serving.keys import OPEN, Caller, Keys


@pytest.fixture
def keys(tmp_path):
    return Keys(tmp_path / "k.json")


def test_keys_are_kept_as_hashes(keys):
    key = keys.add(("ann",))
    assert key not in keys.path.read_text()
    again = Keys(keys.path)
    assert again.caller(key).tenants == ("ann",)
    assert again.caller(key + "x") is None
    assert again.caller(None) is None


def test_a_server_without_keys_has_one_tenant():
    assert Keys(None).caller(None) is OPEN
    assert OPEN.tenant == "default"


@pytest.mark.parametrize(
    "text",
    [
        '[{"sha256": "x", "tenants": ["../up"]}]',
        '[{"sha256": "x", "tenants": []}]',
        '[{"tenants": ["a"]}]',
        "{",
        "[1]",
    ],
)
def test_a_file_that_is_no_list_of_keys_is_refused(tmp_path, text):
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(ConfigError, match="no list of keys"):
        Keys(tmp_path / "bad.json")


def test_a_revoked_key_opens_nothing_and_the_others_go_on(keys):
    first, second = keys.add(("ann",)), keys.add(("ben", "ann"))
    assert keys.revoke(first) == Caller(("ann",))
    assert (keys.caller(first), keys.caller(second).tenant) == (None, "ben")
    digest = next(iter(keys.callers))
    assert keys.revoke(digest[:8]) == Caller(("ben", "ann"))
    with pytest.raises(ConfigError, match="0 keys"):
        keys.revoke(first)


def test_a_short_beginning_of_a_hash_is_no_key(keys):
    keys.add(("ann",))
    with pytest.raises(ConfigError, match="0 keys"):
        keys.revoke(next(iter(keys.callers))[:7])


def test_a_running_server_reads_the_file_again_by_its_path(keys, tmp_path):
    """A replaced file has another inode, as it has when a directory is mounted."""
    server = Keys(keys.path)
    key = keys.add(("ann",))
    assert server.caller(key) == Caller(("ann",))
    other = tmp_path / "other.json"
    other.write_text("[]")
    other.replace(keys.path)
    assert server.caller(key) is None


def test_a_half_written_file_changes_nothing(keys, caplog):
    key = keys.add(("ann",))
    keys.path.write_text("[{")
    assert keys.caller(key) == Caller(("ann",))
    assert "no list of keys" in caplog.text


def test_mistakes(keys):
    with pytest.raises(ConfigError, match="at least one tenant"):
        keys.add(())
    with pytest.raises(InvalidNameError):
        keys.add(("../up",))
    with pytest.raises(ConfigError, match="no key file"):
        Keys(None).add(("ann",))


@hypothesis.given(strategies.text(max_size=60))
def test_no_text_that_was_not_issued_is_a_key(tmp_path_factory, text):
    path = tmp_path_factory.getbasetemp() / "law.json"
    if not path.exists():
        Keys(path).add(("ann",))
    digest = json.loads(path.read_text())[0]["sha256"]
    for guess in (text, digest, digest[:8]):
        assert Keys(path).caller(guess) is None


def test_no_tenant_is_called_auto(tmp_path):
    with pytest.raises(InvalidNameError, match="tenant 'auto' is reserved"):
        Keys(tmp_path / "keys.json").add(("ann", "auto"))
