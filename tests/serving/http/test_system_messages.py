"""An adapter's system message begins conversations without one; another chat template is refused."""

import dataclasses
import logging

import pytest

from tests.serving.fakes import QV, adapter, small_llama
from tests.serving.http.fakes import RunningServer
from veratune.errors import UnsupportedError
from veratune.formats import native
from veratune.serving.conversation import SystemMessages, check_conversation
from veratune.tasks.base import TEMPLATE_HASH
from veratune.tasks.text.chat_template import PLAIN_TEMPLATE, template_hash

SYSTEM = "set timer for minutes"
ASK = [{"role": "user", "content": "turn the light on"}]
TOLD = [{"role": "system", "content": SYSTEM}, *ASK]
OTHER = [{"role": "system", "content": "bad film"}, *ASK]


def test_the_hash_of_the_training_template_is_checked():
    own = template_hash("{{ messages }}")
    assert check_conversation({TEMPLATE_HASH: own}, "{{ messages }}", 10) == ""
    assert check_conversation({TEMPLATE_HASH: template_hash(None)}, PLAIN_TEMPLATE, 10) == ""
    with pytest.raises(UnsupportedError, match="another chat template than this server's base"):
        check_conversation({TEMPLATE_HASH: own}, "{{ messages[0] }}", 10)


def file_with(**task):
    made = adapter(small_llama, QV, 0)
    return native.encode(dataclasses.replace(made, task={"name": "instruction", **task}))


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    made = RunningServer(tmp_path_factory.mktemp("server"))
    made.service.put("ann", "told", file_with(system=SYSTEM))
    made.service.put("ann", "plain", file_with())
    yield made
    made.stop()


@pytest.fixture
def client(served):
    with served.openai() as made:
        yield made


@pytest.fixture
def http(served):
    with served.http() as made:
        yield made


def test_a_chat_is_that_with_the_message_sent_along(client):
    def says(model, messages):
        found = client.chat.completions.create(
            model=model, messages=messages, temperature=0, max_tokens=8
        )
        return found.choices[0].message.content, found.usage.prompt_tokens

    assert says("told", ASK) == says("plain", TOLD)
    assert says("told", OTHER) == says("plain", OTHER)
    assert says("told", ASK) != says("plain", ASK)
    developer = [OTHER[0] | {"role": "developer"}, *ASK]
    assert says("told", developer) == says("plain", OTHER)


def test_responses_and_tokenize_have_it_and_texts_have_not(client, http):
    own, told = (
        client.responses.create(
            model=model, input=messages, temperature=0, max_output_tokens=6
        ).output_text
        for model, messages in (("told", ASK), ("plain", TOLD))
    )
    assert own == told

    def tokens(model, messages):
        body = {"model": model, "messages": messages}
        return http.post("/tokenize", json=body).json()["tokens"]

    assert tokens("told", ASK) == tokens("plain", TOLD) != tokens("plain", ASK)
    own, told = (
        client.completions.create(model=model, prompt="turn the", max_tokens=4, temperature=0)
        for model in ("told", "plain")
    )
    assert own.usage.prompt_tokens == told.usage.prompt_tokens


def test_a_chat_template_of_its_own_is_refused_at_the_upload(served, http):
    base = served.engine.tokenizer.chat_template
    assert http.put("/v1/adapters/x", content=file_with(chat_template=base)).status_code == 201
    refused = http.put("/v1/adapters/y", content=file_with(chat_template="{{ messages }}"))
    assert refused.status_code == 400
    assert "a chat template of its own" in refused.json()["error"]["message"]
    assert http.get("/v1/adapters/y").status_code == 404
    # A store may hold files that another server took.
    served.store.put("ann", "z", file_with(chat_template="{{ messages }}"))
    body = {"model": "z", "messages": ASK}
    assert http.post("/v1/chat/completions", json=body).status_code == 400


@pytest.mark.parametrize(
    ("task", "why"),
    [
        ({"system": ["x"]}, "system message is a list"),
        ({"system": "x" * 101}, "has 101 characters; 100 fit"),
        ({"chat_template": "a"}, "a chat template of its own"),
    ],
)
def test_what_cannot_be_done_is_refused(task, why):
    with pytest.raises(UnsupportedError, match=why):
        check_conversation(task, "b", 100)
    assert check_conversation({"chat_template": "b", "system": None}, "b", 100) == ""


def test_a_file_is_read_once_and_the_log_has_one_line(caplog):
    messages, loads = SystemMessages(None, 100), []
    made = dataclasses.replace(adapter(small_llama, QV, 0), task={"system": "secret"})

    def load():
        loads.append(1)
        return made

    with caplog.at_level(logging.INFO):
        assert {messages.get(("ann", "x", 1), load) for _ in range(3)} == {"secret"}
    assert len(loads) == len(caplog.records) == 1
    assert "6 characters" in caplog.text
    assert "secret" not in caplog.text
