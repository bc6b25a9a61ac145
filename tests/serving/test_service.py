"""Names resolve to one tenant's adapters, bad files are refused before they are stored, and problems are told."""

import pytest

from tests import fakes
from tests.serving.fakes import QV, adapter, encoder, small_llama
from tests.serving.http.fakes import FILES
from veratune.errors import (
    AdapterNotFoundError,
    BaseModelError,
    ConfigError,
    ShutdownError,
    UnsupportedError,
)
from veratune.formats import native
from veratune.serving.engine.engine import Engine
from veratune.serving.engine.scheduler import SchedulerConfig
from veratune.serving.jobs.servable import check_servable
from veratune.serving.keys import Caller
from veratune.serving.pool.pool import AdapterPool
from veratune.serving.service import Service
from veratune.serving.store.sqlite import SqliteStore

ANN, BEN, BOTH = Caller(("ann",)), Caller(("ben",)), Caller(("ann", "ben"))


@pytest.fixture(scope="module")
def engine():
    model = small_llama().eval()
    made = Engine(
        model,
        fakes.tokenizer(),
        AdapterPool(model, slots=4, max_rank=64),
        config=SchedulerConfig(max_num_seqs=4),
        max_model_len=64,
    )
    made.start()
    yield made
    made.close()


@pytest.fixture
def service(engine, tmp_path):
    made = Service(SqliteStore(tmp_path / "a.db"), engine, served_model_name="base")
    yield made
    made.store.close()


def test_a_name_is_an_adapter_of_the_callers_tenants(service):
    service.put("ann", "x", FILES["alice"])
    service.put("ben", "x", FILES["bob"])
    assert service.find_adapter(ANN, "base") is None
    assert service.find_adapter(ANN, "x").key == ("ann", "x", 1)
    assert service.find_adapter(BOTH, "ben/x").key == ("ben", "x", 1)
    for caller, model in ((ANN, "ben/x"), (ANN, "y"), (BEN, "a b"), (BEN, "ann/x")):
        with pytest.raises(AdapterNotFoundError, match="does not exist, or this key may not"):
            service.find_adapter(caller, model)


def test_lists_go_on_behind_a_name_and_over_tenants(service):
    for tenant, name in (("ann", "a"), ("ann", "b"), ("ben", "a"), ("ben", "c")):
        service.put(tenant, name, FILES["alice"])
    names = ["a", "b", "ben/a", "ben/c"]
    assert [name for name, _ in service.list_adapters(BOTH, "", 10)] == names
    for i, name in enumerate(names):
        assert [n for n, _ in service.list_adapters(BOTH, name, 10)] == names[i + 1 :]
        assert [n for n, _ in service.list_adapters(BOTH, "", i + 1)] == names[: i + 1]


def test_a_file_of_another_base_model_is_not_stored(service):
    with pytest.raises(BaseModelError):
        service.put("ann", "x", native.encode(adapter(fakes.bert, QV, 0)))
    with pytest.raises(AdapterNotFoundError):
        service.store.newest("ann", "x")


def test_the_same_bytes_are_stored_once(service):
    assert service.put_if_changed("ann", "x", FILES["alice"]).number == 1
    assert service.put_if_changed("ann", "x", FILES["alice"]).number == 1
    assert service.put_if_changed("ann", "x", FILES["bob"]).number == 2


@pytest.mark.parametrize(
    ("settings", "error", "why"),
    [
        ({"rank": 65}, UnsupportedError, "rank 65 could not be served here; ranks up to 64"),
        ({"rank": 0}, ConfigError, "rank"),
        ({"rank": 8, "targets": ["nowhere"]}, ConfigError, "targets: .*nowhere"),
        ({"rank": 8, "targets": ["re:(a+)+$"]}, ConfigError, "targets"),
    ],
)
def test_settings_whose_adapter_could_not_be_published_are_refused(service, settings, error, why):
    with pytest.raises(error, match=why):
        check_servable(service.loops, "base", settings)


def test_settings_that_can_be_published_pass(service):
    check_servable(service.loops, "base", {"rank": 64, "targets": ["query", "value"], "lr": 1e-3})


def test_a_draining_service_takes_nothing_and_is_not_ready(service, engine):
    assert service.problem() is None
    fields = service.request_fields(ANN, "base", engine)
    assert fields == {"tenant": "ann"}
    service.draining = True
    assert service.problem() == "the server is shutting down"
    with pytest.raises(ShutdownError):
        service.request_fields(ANN, "base", engine)


def test_base_models_have_names_of_their_own(service, engine):
    with pytest.raises(ConfigError, match="nothing to serve"):
        Service(service.store)
    with pytest.raises(ConfigError, match="both base models are called 'x'"):
        Service(service.store, engine, encoder(), served_model_name="x", served_encoder_name="x")
    with pytest.raises(UnsupportedError, match="no encoder"):
        service.require_encoder()
