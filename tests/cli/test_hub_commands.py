"""train --push-to-hub, vt.load and serve --adapters hf://, against a local hub with a private token."""

import json

import httpx2 as httpx
import pytest
import torch

import veratune as vt
from tests import fakes
from tests.cli.servers import server_of
from tests.fakes import scramble
from tests.formats.hub_server import hub_in_use
from veratune.cli.main import main
from veratune.errors import AdapterFileError, DataError
from veratune.serving.app import create_service
from veratune.serving.config import ServeConfig

TOKENS = torch.arange(2, 18).view(2, 8)
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def hub(monkeypatch, tmp_path):
    yield from hub_in_use(monkeypatch, tmp_path / "cache")


@pytest.fixture
def pushed(hub, tmp_path):
    """(adapted model, its file), pushed to the private repository ann/style."""
    model = scramble(vt.attach(fakes.llama(), vt.VeraConfig(rank=8), "a"), "a")
    file = tmp_path / "style.safetensors"
    vt.save(model, file)
    assert main(["push", str(file), "ann/style", "--private"]) == 0
    return model, file


def newer(data: bytes) -> bytes:
    """The file as a later format version would begin."""
    out = data.replace(b'\\"version\\":2', b'\\"version\\":3')
    assert out != data
    return out


def test_train_pushes_what_it_wrote(hub, tmp_path, capsys):
    base = fakes.folder(fakes.llama(), tmp_path / "llama")
    rows = [{"prompt": f"light {x}", "completion": f"set {x}"} for x in ("on", "off")] * 4
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = f"train --model {base} --task instruction --data {data} --eval-data {data}".split()
    words += f"--out {tmp_path / 'run'} --rank 8 --epochs 1 --device cpu --preview 0".split()
    assert main([*words, "--push-to-hub", "ann/house", "--private"]) == 0
    assert "/ann/house/commit/" in capsys.readouterr().out
    assert hub.private["ann/house"]
    (files,) = hub.commits["ann/house"]
    written = (tmp_path / "run" / "adapter.safetensors").read_bytes()
    assert files["adapter.safetensors"] == written
    card = files["README.md"].decode()
    result = json.loads((tmp_path / "run" / "results.json").read_text())
    before, after = result["before"]["loss"], result["after"]["loss"]
    assert f"| loss | {before:.4f} | {after:.4f} |" in card
    assert "base_model: llama\n" in card
    assert "library_name: veratune\n" in card
    assert "| Data set | rows.jsonl (local) |" in card
    assert "datasets:" not in card
    assert str(tmp_path) not in card
    model, other = fakes.llama(), fakes.llama()
    vt.load(model, "hf://ann/house")
    vt.load(other, tmp_path / "run" / "adapter.safetensors")
    torch.testing.assert_close(model(TOKENS).logits, other(TOKENS).logits)


def test_a_repository_that_cannot_be_written_keeps_the_run(hub, monkeypatch, tmp_path, capsys):
    base = fakes.folder(fakes.llama(), tmp_path / "llama")
    data = tmp_path / "rows.jsonl"
    data.write_text(json.dumps({"prompt": "light on", "completion": "set on"}) + "\n")
    monkeypatch.setenv("HF_TOKEN", "wrong")
    words = f"train --model {base} --task instruction --data {data} --epochs 1 --device cpu".split()
    words += ["--preview", "0", "--rank", "4", "--push-to-hub", "ann/house"]
    assert main([*words, "--out", str(tmp_path / "run")]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("veratune: hf://ann/house: ")
    assert (tmp_path / "run" / "adapter.safetensors").is_file()
    assert "ann/house" not in hub.commits


def test_a_server_takes_a_private_adapter_at_a_revision(hub, pushed, tmp_path):
    model, file = pushed
    scramble(model, "a", seed=1)
    vt.save(model, tmp_path / "second.safetensors")
    assert main(["push", str(tmp_path / "second.safetensors"), "ann/style"]) == 0
    environment = {
        "HF_ENDPOINT": hub.url,
        "HF_TOKEN": hub.token,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_CACHE": str(tmp_path / "server"),
    }
    words = ["--adapters", f"first=hf://ann/style@{1:040x},last=hf://ann/style"]
    with server_of(tmp_path, words, environment) as (_, url):
        said = {name: completion(url, name) for name in ("first", "last", "llama")}
    for name, source in (("first", file), ("last", tmp_path / "second.safetensors")):
        other = fakes.llama()
        vt.load(other, source)
        assert said[name] == greedy(other), name
    assert said["llama"] == greedy(fakes.llama())
    assert len(set(map(tuple, said.values()))) == 3


def completion(url: str, model: str) -> list[int]:
    """Greedy completion of a server, as tokens."""
    body = {"model": model, "prompt": TOKENS[0].tolist(), "max_tokens": 8, "temperature": 0}
    reply = httpx.post(f"{url}/v1/completions", json={**body, "ignore_eos": True}, timeout=60)
    reply.raise_for_status()
    return fakes.tokenizer()(reply.json()["choices"][0]["text"])["input_ids"]


def greedy(model: torch.nn.Module) -> list[int]:
    """The same completion by transformers, through text as the server sends it."""
    out = model.generate(TOKENS[:1], max_new_tokens=8, do_sample=False, eos_token_id=None)
    tokenizer = fakes.tokenizer()
    return tokenizer(tokenizer.decode(out[0, 8:], skip_special_tokens=True))["input_ids"]


@pytest.mark.parametrize(
    ("address", "token", "message"),
    [
        ("hf://ann/gone", "secret", "hf://ann/gone: no such repository, or it is private"),
        ("hf://ann/style@v9", "secret", "hf://ann/style: the repository has no such revision"),
        ("hf://ann/style", "wrong", "hf://ann/style: no such repository, or it is private"),
    ],
)
def test_what_the_hub_does_not_give_is_refused_by_name(
    pushed, monkeypatch, tmp_path, address, token, message
):
    monkeypatch.setenv("HF_TOKEN", token)
    model = fakes.llama()
    with pytest.raises(DataError, match=message):
        vt.load(model, address)
    assert not vt.adapters(model)
    base = fakes.folder(model, tmp_path / "llama")
    config = ServeConfig(model=base, store=str(tmp_path / "a.db"), adapters=[f"style={address}"])
    with pytest.raises(DataError, match=message):
        create_service(config)


def test_a_newer_file_of_the_hub_is_refused_everywhere(hub, pushed, tmp_path, capsys):
    _, file = pushed
    hub.commits["ann/style"][-1]["adapter.safetensors"] = newer(file.read_bytes())
    message = "its format version is 3; this veratune reads versions 1 and 2"
    model = fakes.llama()
    with pytest.raises(AdapterFileError, match=message):
        vt.load(model, "hf://ann/style")
    assert not vt.adapters(model)
    base = fakes.folder(model, tmp_path / "llama")
    config = ServeConfig(
        model=base, store=str(tmp_path / "a.db"), adapters=["style=hf://ann/style"]
    )
    with pytest.raises(AdapterFileError, match=message):
        create_service(config)
    capsys.readouterr()
    before = set(tmp_path.rglob("*"))
    assert main(["pull", "hf://ann/style", "--out", str(tmp_path / "x" / "a.safetensors")]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert {path for path in tmp_path.rglob("*") if "cache" not in path.parts} <= before
