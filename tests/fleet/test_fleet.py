"""vt.Fleet: tenants' adapters into a store, and on from it."""

import json

import pytest

import veratune as vt
from tests import fakes
from veratune.errors import ConfigError
from veratune.fleet.fleet import StoreAdapters
from veratune.formats import native
from veratune.serving.store.sqlite import SqliteStore

pytestmark = pytest.mark.filterwarnings("ignore")
CONFIG = vt.VeraConfig(rank=4)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    out = tmp_path_factory.mktemp("fleet")
    fakes.folder(fakes.llama(), out / "llama")
    rows = [
        {"tenant": tenant, "prompt": f"turn on light {i}", "completion": f"light {tenant}"}
        for tenant in ("ann", "bob", "cy")
        for i in range(4)
    ]
    (out / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return out


def fleet(place, out, **settings):
    common = {"lr": 2e-2, "batch_size": 2, "epochs": 1, "device": "cpu", "keep": "last"}
    return vt.Fleet(str(place / "llama"), "instruction", out, CONFIG, **{**common, **settings})


def test_adapters_become_versions_of_a_store_and_go_on_from_it(place, tmp_path):
    address = str(tmp_path / "store.db")
    first = fleet(place, tmp_path / "one", store=address, adapter_name="house")
    assert first.train(place / "data.jsonl").trained == 3
    assert not (tmp_path / "one" / "adapters").exists()
    store = SqliteStore(address)
    start = native.decode(store.get("bob", "house", 1))
    again = fleet(
        place, tmp_path / "two", store=address, adapter_name="house", continue_from=address
    )
    result = again.train(place / "data.jsonl")
    assert result.trained == 3
    assert [v.number for v in store.versions("bob", "house")] == [2, 1]
    frozen = fleet(place, tmp_path / "three", adapter_name="house", continue_from=address, lr=1e-20)
    frozen.train(place / "data.jsonl")
    kept = native.read(tmp_path / "three" / "adapters" / "bob.safetensors")
    newest = native.decode(store.get("bob", "house", 2))
    assert all((kept.d[k] == v).all() for k, v in newest.d.items())
    assert any((start.d[k] != v).any() for k, v in newest.d.items())
    store.close()


def test_the_same_bytes_are_no_new_version(tmp_path):
    store = SqliteStore(tmp_path / "store.db")
    adapters = StoreAdapters(store, "house")
    assert adapters.get("ann") is None
    model = vt.attach(fakes.llama(), CONFIG, "ann")
    adapters.put("ann", vt.extract(model, "ann"))
    adapters.put("ann", vt.extract(model, "ann"))
    assert len(store.versions("ann", "house")) == 1
    store.close()


def test_unknown_settings_and_sources_are_refused(place, tmp_path):
    with pytest.raises(ConfigError, match="no setting 'learning_rate'"):
        fleet(place, tmp_path / "out", learning_rate=1)
    with pytest.raises(ConfigError, match="no folder and no store"):
        fleet(place, tmp_path / "out", continue_from="nowhere").train(place / "data.jsonl")
