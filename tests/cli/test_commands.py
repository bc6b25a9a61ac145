"""Every command as a user types it, in-process (the exit status is main's return value)."""

import importlib
import io
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx2 as httpx
import psutil
import pytest
import safetensors.torch
import torch
import transformers as hf
import yaml
from PIL import Image

import veratune as vt
from tests import fakes
from tests.cli.servers import server_of
from tests.fakes import scramble
from veratune.cli.main import COMMANDS, main
from veratune.errors import ConfigError
from veratune.formats import native
from veratune.model_state import vectors_of

pytestmark = pytest.mark.filterwarnings("ignore")


def run(capsys, *words: object) -> tuple[int, str, str]:
    capsys.readouterr()
    status = main([str(w) for w in words])
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    return status, out, err


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    out = tmp_path_factory.mktemp("cli")
    fakes.folder(fakes.llama(), out / "llama")
    fakes.folder(fakes.gpt2(), out / "gpt2")
    rows = [{"prompt": f"light {x}", "completion": f"set {x}"} for x in ("on", "off")] * 8
    (out / "talk.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    model = hf.AutoModelForCausalLM.from_pretrained(out / "llama").eval()
    vt.attach(model, vt.VeraConfig(rank=8), "a")
    scramble(model, "a")
    vt.save(model, out / "a.safetensors")
    return out


@pytest.mark.parametrize("name", COMMANDS)
def test_help_states_defaults(name, capsys):
    with pytest.raises(SystemExit) as caught:
        main([name, "--help"])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    assert out.startswith(f"usage: veratune {name}")
    assert name in ("pull", "sign") or "default:" in out


def test_overview(capsys):
    assert run(capsys, "--help")[0] == 0
    assert run(capsys)[0] == 2
    assert run(capsys, "--version")[1] == f"veratune {vt.__version__}\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["cuont"], "unknown command 'cuont'; did you mean 'count'"),
        (["count", "--modle", "x"], "unknown flag '--modle'; did you mean '--model'"),
        (["train", "--learning-rate", "1e-3"], "'--learning-rate'; here it is --lr"),
        (["train", "--load_in_4bit", "1"], "'--load-in-4bit'; here it is --quantize"),
        (["train", "--quantize", "3bit"], "--quantize: '3bit' is none of 4bit, 8bit"),
        (["export", "x", "--to", "ollama"], "mlx-lm; for ollama it is gguf-lora"),
        (["count", "--model", "x", "--rank", "many"], "rank"),
        (["count", "--model", "x", "--method", "lroa"], "method"),
        (
            ["count", "--model", "x", "--rank", "0"],
            "rank is 0; it must be an integer of at least 1",
        ),
        (["count"], "model"),
        (["train", "--config"], "--config wants the name of a YAML file"),
        (
            ["train", "--config", "/nowhere.yaml"],
            "/nowhere.yaml: cannot be read: No such file or directory",
        ),
    ],
)
def test_mistakes_in_the_command_line_end_with_2(words, message, capsys):
    status, out, err = run(capsys, *words)
    assert status == 2
    assert message in err
    assert err.count("\n") == 1
    assert not out


def test_flags_are_shown_with_hyphens_and_taken_with_underscores_too(tmp_path):
    from veratune.cli.parsing import parse
    from veratune.cli.train_ import parser

    assert not re.search(r"--\w+_\w", parser().format_help())
    needed = ["--model", "m", "--task", "t", "--data", "d", "--out", "o"]
    (tmp_path / "run.yaml").write_text("max_length: 7\n")
    for words in (
        ["--max-length", "7"],
        ["--max" + "_length=7"],
        ["--config", tmp_path / "run.yaml"],
    ):
        assert parse(parser(), [*map(str, words), *needed]).max_length == 7
    (tmp_path / "run.yaml").write_text("max-length: 7\n")
    with pytest.raises(ConfigError, match="unknown key 'max-length'; did you mean 'max_length'"):
        parse(parser(), ["--config", str(tmp_path / "run.yaml"), *needed])


LLAMA = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "vocab_size": 32000,
}
ROBERTA = {"vocab_size": 50265}


@pytest.mark.parametrize(
    ("config", "flags", "trainable"),
    [
        (hf.RobertaConfig(**ROBERTA), ["--rank", 1024, "--targets", "query,value"], 43_008),
        (hf.RobertaConfig(**ROBERTA, architectures=["RobertaForMaskedLM"]), ["--rank", 1024], 43_008),
        (hf.RobertaConfig(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096), ["--rank", 256], 61_440),
        (hf.GPT2Config(n_embd=1024, n_layer=24, n_head=16), ["--rank", 1024], 98_304),
        (hf.GPT2Config(n_embd=1280, n_layer=36, n_head=20, architectures=["GPT2LMHeadModel"]), ["--rank", 1024], 165_888),
        (hf.GPT2Config(n_embd=1280, n_layer=36, n_head=20), ["--rank", 1024, "--targets", "query,value"], 165_888),
        (hf.GPT2Config(n_embd=1024, n_layer=24, n_head=16), ["--rank", 4, "--method", "lora"], 393_216),
        (hf.LlamaConfig(**LLAMA, architectures=["LlamaForCausalLM"]), ["--rank", 1024, "--targets", "all-linear"], 1_589_248),
        (hf.LlamaConfig(**LLAMA, architectures=["LlamaForCausalLM"]), ["--rank", 256, "--targets", "all-linear"], 1_417_216),
        (
            hf.LlamaConfig(**LLAMA, architectures=["LlamaForCausalLM"]),
            ["--rank", 64, "--targets", "all-linear", "--method", "lora"], 159_907_840,
        ),
    ],
)  # fmt: skip
def test_count_gives_the_papers_figures(config, flags, trainable, tmp_path, capsys):
    config.to_json_file(tmp_path / "config.json", use_diff=False)
    status, out, _ = run(capsys, "count", "--model", tmp_path / "config.json", *flags, "--json")
    found = json.loads(out)
    assert status == 0
    assert found["trainable"] == trainable
    assert found["bytes_fp32"] == 4 * trainable
    assert found["bytes_bf16"] == 2 * trainable


def test_count_knows_the_size_of_the_file_before_it_is_there(place, capsys):
    found = json.loads(run(capsys, "count", "--model", place / "llama", "--rank", 8, "--json")[1])
    assert (
        abs(found["file_bytes"] - (place / "a.safetensors").stat().st_size) < 120
    )  # the path in it differs
    assert found["basis_bytes"] == 4 * (8 * 32 + 32 * 8)
    full = json.loads(
        run(capsys, "count", "--model", place / "llama", "--method", "full", "--json")[1]
    )
    assert (
        full["trainable"]
        == full["base_parameters"]
        == sum(p.numel() for p in fakes.llama().parameters())
    )
    assert (
        json.loads(
            run(capsys, "count", "--model", place / "llama", "--method", "bitfit", "--json")[1]
        )["trainable"]
        == 0
    )
    assert "trainable" in run(capsys, "count", "--model", place / "llama")[1]
    status, _, err = run(capsys, "count", "--model", place / "nothing.json")
    assert status == 1
    assert "nothing.json: no such file" in err


def test_count_of_a_classifier_keeps_the_head_apart(tmp_path, capsys):
    fakes.bert(labels=3).save_pretrained(tmp_path)
    for method, trainable in (
        ("head", 99),
        (
            "bitfit",
            sum(p.numel() for n, p in fakes.bert().named_parameters() if n.endswith("bias")),
        ),
    ):
        found = json.loads(
            run(capsys, "count", "--model", tmp_path, "--method", method, "--json")[1]
        )
        assert (found["trainable"], found["head"]) == (trainable, 99)


def test_train_eval_and_chat(place, tmp_path, capsys):
    config = tmp_path / "run.yaml"
    settings = {
        "model": str(place / "llama"), "task": "instruction", "data": str(place / "talk.jsonl"), "out": str(tmp_path / "run"),
        "targets": "query,value", "rank": 16, "epochs": 2, "max_length": 40, "device": "cpu", "columns": {"prompt": "prompt"},
    }  # fmt: skip
    config.write_text(yaml.safe_dump(settings))
    status, out, err = run(
        capsys,
        "train",
        "--config",
        config,
        "--rank",
        8,
        "--eval-data",
        place / "talk.jsonl",
        "--json",
    )
    assert status == 0, err
    result = json.loads(out)
    assert native.read(result["path"]).config.rank == 8  # the flag overrules the file
    assert "loss" in err  # progress goes to standard error
    # what a run writes down can be run again
    status, out, err = run(
        capsys, "train", "--config", tmp_path / "run" / "run.yaml", "--out", tmp_path / "again"
    )
    assert status == 0, err
    assert (tmp_path / "again" / "adapter.safetensors").read_bytes() == (
        tmp_path / "run" / "adapter.safetensors"
    ).read_bytes()
    assert "the loss is on what is between [[ and ]]" in " ".join(out.split())

    status, out, err = run(capsys, "eval", "--model", place / "llama", "--adapter", result["path"], "--data", place / "talk.jsonl",
                           "--device", "cpu", "--generate", "--max-new-tokens", 4, "--json")  # fmt: skip
    assert status == 0, err
    scores = json.loads(out)
    assert set(scores) == {"base", "adapter"}
    assert scores["adapter"]["loss"] == pytest.approx(result["after"]["loss"], rel=1e-4)
    assert scores["base"]["loss"] == pytest.approx(result["before"]["loss"], rel=1e-4)
    assert "exact_match" in scores["adapter"]

    chat = (
        "chat",
        "--model",
        place / "llama",
        "--adapter",
        result["path"],
        "--device",
        "cpu",
        "--max-new-tokens",
        4,
    )
    status, out, err = run(capsys, *chat, "--prompt", "light on")
    assert status == 0, err
    assert out.strip()


def test_chat_takes_turns_and_commands(place, capsys, monkeypatch):
    monkeypatch.setattr(
        sys, "stdin", io.StringIO("light on\n/base\nlight on\n/new\n/what\n/quit\n")
    )
    status, out, err = run(capsys, "chat", "--model", place / "llama", "--adapter", place / "a.safetensors", "--device", "cpu",
                           "--max-new-tokens", 3)  # fmt: skip
    assert status == 0
    assert "adapter off: the bare base model" in err
    assert "unknown command '/what'" in err
    assert out.count(">") >= 5


def test_a_sweep_ranks_its_runs(place, tmp_path, capsys):
    words = ["train", "--model", place / "llama", "--task", "instruction", "--data", place / "talk.jsonl", "--eval-data",
             place / "talk.jsonl", "--out", tmp_path / "s", "--epochs", 8, "--max-length", 40, "--device", "cpu", "--rank", 8]  # fmt: skip
    status, out, err = run(capsys, *words, "--sweep", "lr=1e-6,5e-2")
    assert status == 0, err
    assert out.index("0.05") < out.index("1e-06")
    assert (tmp_path / "s" / "adapter.safetensors").is_file()
    status, _, err = run(capsys, *words, "--sweep", "lr")
    assert status == 2
    assert "--sweep has 'lr'; name=value,value is wanted" in err


def test_an_unknown_key_of_a_file_names_the_nearest(place, tmp_path, capsys):
    (tmp_path / "run.yaml").write_text("model: x\nrnak: 3\n")
    status, _, err = run(capsys, "train", "--config", tmp_path / "run.yaml")
    assert status == 2
    assert "unknown key 'rnak'; did you mean 'rank'" in err


def test_mistakes_in_data_and_files_end_with_1(place, tmp_path, capsys):
    base = ["train", "--model", place / "llama", "--task", "instruction", "--device", "cpu"]
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("")
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "bad.safetensors").write_bytes(b"\0" * 50)
    for words, message in (
        (
            [*base, "--data", tmp_path / "no.jsonl", "--out", tmp_path / "o"],
            "no such file or folder",
        ),
        ([*base, "--data", tmp_path / "empty.jsonl", "--out", tmp_path / "o"], "the file is empty"),
        (
            [*base, "--data", place / "talk.jsonl", "--out", tmp_path / "full"],
            "the output folder is not empty",
        ),
        (
            [*base, "--data", place / "talk.jsonl", "--out", tmp_path / "o", "--targets", "quary"],
            "did you mean 'query'",
        ),
        (["inspect", tmp_path / "bad.safetensors"], "not a whole safetensors file"),
        (
            [
                "eval",
                "--model",
                place / "gpt2",
                "--adapter",
                place / "a.safetensors",
                "--data",
                place / "talk.jsonl",
            ],
            "another base model",
        ),
        (
            ["eval", "--model", "nobody/nothing", "--data", place / "talk.jsonl"],
            "Without network, pass the path of a local folder",
        ),
    ):
        status, out, err = run(capsys, *words)
        assert (status, out) == (1, ""), err
        assert message in err
        assert not (tmp_path / "o").exists()


def test_inspect_shows_and_draws(place, tmp_path, capsys):
    status, out, _ = run(
        capsys, "inspect", place / "a.safetensors", "--json", "--plot", tmp_path / "a.png"
    )
    found = json.loads(out)
    assert status == 0
    assert found["trainable"] == sum(
        v.numel()
        for x in (native.read(place / "a.safetensors"),)
        for m in (x.d, x.b)
        for v in m.values()
    )
    picture = Image.open(tmp_path / "a.png")
    assert picture.size[0] > 500
    assert len(picture.convert("RGB").getcolors(10**6)) > 20  # something is drawn
    status, out, _ = run(capsys, "inspect", place / "a.safetensors")
    assert "self_attn.q_proj" in out
    status, _, err = run(
        capsys, "inspect", place / "a.safetensors", "--plot", tmp_path / "a.nonsense"
    )
    assert status == 1
    assert "the picture could not be written" in err


def test_merge_writes_a_plain_model(place, tmp_path, capsys):
    status, out, err = run(capsys, "merge", "--model", place / "llama", "--adapter", place / "a.safetensors", "--out", tmp_path / "m",
                           "--device", "cpu", "--task", "instruction")  # fmt: skip
    assert status == 0, err
    assert "4 weights merged in float32" in out
    merged = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "m").eval()
    model = hf.AutoModelForCausalLM.from_pretrained(place / "llama").eval()
    vt.load(model, place / "a.safetensors")
    tokens = torch.arange(2, 12)[None]
    torch.testing.assert_close(merged(tokens).logits, model(tokens).logits, rtol=1e-4, atol=1e-4)
    assert set(safetensors.torch.load_file(tmp_path / "m" / "model.safetensors")) == set(
        safetensors.torch.load_file(place / "llama" / "model.safetensors")
    )
    status, _, err = run(capsys, "merge", "--model", place / "gpt2", "--adapter", place / "a.safetensors", "--out", tmp_path / "n",
                         "--device", "cpu")  # fmt: skip
    assert status == 1
    assert not (tmp_path / "n").exists()


def test_a_principal_adapter_is_exported_with_its_base_model(tmp_path, capsys):
    folder = fakes.folder(fakes.llama(), tmp_path / "llama")
    config = vt.VeraConfig(rank=4, vectors="d", basis="principal")
    model = scramble(vt.attach(fakes.llama(), config, "a"), "a")
    vt.save(model, tmp_path / "a.safetensors")
    words = ("export", tmp_path / "a.safetensors", "--to", "peft-lora", "--out", tmp_path / "lora")
    status, _, err = run(capsys, *words)
    assert status != 0
    assert "give the base model: --model" in err
    assert run(capsys, *words, "--model", folder)[0] == 0
    lora = safetensors.torch.load_file(tmp_path / "lora" / "adapter_model.safetensors")
    layer = next(v for v in vectors_of(model, "a") if v.layer.endswith("q_proj"))
    a, b = (lora[f"base_model.model.{layer.layer}.lora_{kind}.weight"] for kind in "AB")
    wanted = layer.delta_weight(torch.device("cpu"), torch.float32).detach()
    torch.testing.assert_close(b @ a, wanted, atol=1e-5, rtol=1e-5)


def test_export_and_import(place, tmp_path, capsys):
    source = place / "a.safetensors"
    assert run(capsys, "export", source, "--to", "peft", "--out", tmp_path / "peft")[0] == 0
    assert run(capsys, "export", source, "--to", "peft-lora", "--out", tmp_path / "lora")[0] == 0
    assert (
        run(
            capsys,
            "export",
            source,
            "--to",
            "safetensors",
            "--dtype",
            "bfloat16",
            "--out",
            tmp_path / "b.safetensors",
        )[0]
        == 0
    )
    half = native.read(tmp_path / "b.safetensors")
    assert {v.dtype for v in half.d.values()} == {torch.bfloat16}
    status, _, err = run(
        capsys, "export", source, "--to", "peft", "--dtype", "bfloat16", "--out", tmp_path / "x"
    )
    assert status == 2
    assert "--dtype is for --to safetensors" in err

    model = vt.attach(
        hf.AutoModelForCausalLM.from_pretrained(place / "llama"),
        vt.VeraConfig(rank=8, basis="peft"),
        "p",
    )
    scramble(model, "p")
    vt.save(model, tmp_path / "p.safetensors")
    assert (
        run(capsys, "export", tmp_path / "p.safetensors", "--to", "peft", "--out", tmp_path / "p")[
            0
        ]
        == 0
    )
    status, _out, err = run(
        capsys,
        "import",
        tmp_path / "p",
        "--model",
        place / "llama" / "config.json",
        "--out",
        tmp_path / "q.safetensors",
    )
    assert status == 0, err
    one, two = native.read(tmp_path / "p.safetensors"), native.read(tmp_path / "q.safetensors")
    assert all(torch.equal(one.d[k], two.d[k]) and torch.equal(one.b[k], two.b[k]) for k in one.d)
    # The export of another basis cannot be had back from a seed, and is not taken for one that can.
    status, _, err = run(
        capsys,
        "import",
        tmp_path / "peft",
        "--model",
        place / "llama",
        "--out",
        tmp_path / "r.safetensors",
    )
    assert status == 1
    assert "are not what seed 0 draws" in err
    assert not (tmp_path / "r.safetensors").exists()


def test_the_installed_command():
    out = subprocess.run(
        [sys.executable, "-m", "veratune", "count", "--model", "/nowhere.json"],
        capture_output=True,
        text=True,
    )
    assert out.returncode == 1
    assert out.stderr == "veratune: /nowhere.json: no such file\n"


def test_a_diffusion_adapter_from_the_command_line(tmp_path, capsys):
    model, data = fakes.stable_diffusion(tmp_path), tmp_path / "dog"
    data.mkdir()
    for i, (image, _) in enumerate(fakes.image_rows(4)):
        image.save(data / f"{i}.png")
    status, out, err = run(
        capsys, "train", "--task", "text-to-image", "--model", model, "--data", data, "--caption", "a dog", "--out", tmp_path / "run",
        "--rank", 4, "--epochs", 1, "--batch-size", 4, "--sample-steps", 1, "--device", "cpu", "--lr", "1e-2", "--json",
    )  # fmt: skip
    assert status == 0, err
    adapter = json.loads(out)["path"]
    grid = tmp_path / "grid.png"
    status, out, err = run(
        capsys,
        "sample",
        "--model",
        model,
        "--adapter",
        adapter,
        "--count",
        2,
        "--steps",
        1,
        "--out",
        grid,
        "--device",
        "cpu",
    )
    assert (status, out) == (0, f"{grid}: 4 images\n"), err
    assert run(capsys, "sample", "--model", model, "--adapter", adapter, "--count", 0)[0] == 2
    status, out, err = run(
        capsys,
        "merge",
        "--model",
        model,
        "--adapter",
        adapter,
        "--out",
        tmp_path / "merged",
        "--device",
        "cpu",
    )
    assert status == 0, err
    assert (tmp_path / "merged" / "model_index.json").is_file()
    status, _, err = run(
        capsys,
        "sample",
        "--model",
        tmp_path / "merged",
        "--task",
        "text-to-image",
        "--steps",
        1,
        "--device",
        "cpu",
    )
    assert (status, "no prompt; say what to draw with --prompts" in err) == (2, True)


def test_sample_wants_images(place, capsys):
    status, _, err = run(
        capsys,
        "sample",
        "--model",
        place / "llama",
        "--adapter",
        place / "a.safetensors",
        "--device",
        "cpu",
    )
    assert status == 2
    assert "sample draws images, but the adapter's task is 'instruction'" in err


def test_a_server_that_is_ended_ends_the_job_that_it_runs(tmp_path):
    with server_of(tmp_path, ["--jobs", str(tmp_path / "jobs"), "--served-model-name", "tiny"]) as (
        server,
        url,
    ):
        rows = {"file": ("rows.jsonl", b'{"prompt": "light", "completion": "on"}\n' * 8)}
        file = httpx.post(f"{url}/v1/files", files=rows, data={"purpose": "fine-tune"}).json()["id"]
        httpx.post(
            f"{url}/v1/fine_tuning/jobs", json={"model": "tiny", "training_file": file}
        ).raise_for_status()
        end = time.time() + 30
        while not (found := list((tmp_path / "jobs").glob("job-*/pid"))) and time.time() < end:
            time.sleep(0.02)
        job = psutil.Process(int(found[0].read_text()))
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 0
        assert not job.is_running()
    assert "Traceback" not in server.said


def test_a_server_answers_and_drains_on_sigterm(tmp_path):
    """An adapter from a file; answers that have begun come whole."""
    long = {"max_position_embeddings": 2048, "eos_token_id": None}
    model = vt.attach(fakes.llama(**long), vt.VeraConfig(rank=4, targets=("query",)), "x")
    vt.save(model, tmp_path / "x.safetensors", name="x")
    words = ["--adapters", f"mine={tmp_path / 'x.safetensors'}", "--served-model-name", "tiny"]
    words += ["--shutdown-timeout", "120"]  # a busy machine may need more than the default
    begun, ends = threading.Semaphore(0), []

    def ask():
        body = {
            "model": "mine",
            "prompt": [4, 5],
            "max_tokens": 800,
            "temperature": 1,
            "seed": 1,
            "stream": True,
        }
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=120) as reply:
            lines = []
            for line in reply.iter_lines():
                if line:
                    if not lines:
                        begun.release()
                    lines.append(line)
            ends.append(lines[-2:])

    with server_of(tmp_path, words, **long) as (server, url):
        threads = [threading.Thread(target=ask) for _ in range(4)]
        for thread in threads:
            thread.start()
        for _ in range(4):
            assert begun.acquire(timeout=30)
        server.send_signal(signal.SIGTERM)
        assert not ends  # all of them are in the middle
        for thread in threads:
            thread.join()
        server.wait(60)
        with pytest.raises(httpx.ConnectError):
            httpx.get(url)
    assert server.returncode == 0
    assert len(ends) == 4
    for last, done in ends:
        assert '"finish_reason": "length"' in last or '"finish_reason": "stop"' in last
        assert done == "data: [DONE]"
    said = server.said
    assert f"tiny on {url}" in said.replace("\n", " ")
    told = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
    assert {
        (line["path"], line["status"], line["tenant"])
        for line in told
        if line.get("method") == "POST"
    } == {("/v1/completions", 200, "default")}
    assert "max_tokens" not in said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            "serve --model m --max-loaded-adapters 0",
            "max_loaded_adapters is 0; 1 to ",
        ),
        (
            "serve --model m --adapter-memory-gib inf",
            "--adapter-memory-gib: Expected a <class 'float'>. Got value: inf",
        ),
        ("serve --model m --port 99999", "port is 99999; 0 to 65535 is wanted"),
        (
            "serve --model m --shutdown-timeout nan",
            "--shutdown-timeout: Expected a <class 'float'>. Got value: nan",
        ),
        ("serve --model m --threads 0", "threads is 0; 1 to "),
        ("sample --model m --count 0", "--count: Not of type PositiveInt: 0 does not conform"),
    ],
)
def test_a_number_out_of_bounds_is_one_line(words, said, capsys):
    assert main(words.split()) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_a_key_is_printed_once_and_a_server_without_keys_stays_at_home(tmp_path, capsys):
    assert main(["key", "--key-file", str(tmp_path / "k.json"), "--tenants", "ann,ben"]) == 0
    key = capsys.readouterr().out.strip()
    assert key.startswith("vt-")
    assert key not in (tmp_path / "k.json").read_text()
    file = ["key", "--key-file", str(tmp_path / "k.json")]
    assert main([*file, "--tenants", "cid"]) == 0
    other = capsys.readouterr().out.strip()
    assert main(file) == 0
    listed = [line.split("  ") for line in capsys.readouterr().out.splitlines()]
    assert [tenants for _, tenants in listed] == ["ann, ben", "cid"]
    for wrong in ("vt-unknown-key", listed[0][0][:7], ""):
        assert main([*file, "--revoke", wrong]) == 2
        assert "0 keys of" in capsys.readouterr().err
    assert main([*file, "--revoke", listed[0][0]]) == 0
    assert main([*file, "--revoke", other]) == 0
    assert main([*file, "--revoke", other, "--tenants", "cid"]) == 2
    capsys.readouterr()
    assert main(file) == 0
    assert "has no keys" in capsys.readouterr().err
    assert main(["serve", "--model", "m", "--host", "0.0.0.0"]) == 1
    assert "listens on 127.0.0.1 only" in capsys.readouterr().err
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert main(["serve", "--model", "m", "--port", str(port)]) == 2
        assert (
            f"port {port} of 127.0.0.1 cannot be had: Address already in use"
            in capsys.readouterr().err
        )
    assert (
        main(
            ["serve", "--model", "m", "--host", "192.0.2.1", "--key-file", str(tmp_path / "k.json")]
        )
        == 2
    )
    assert "of 192.0.2.1 cannot be had" in capsys.readouterr().err
    assert main(["serve", "--model", "m", "--adapters", "x"]) == 2
    assert "NAME=FILE of an adapter's file is wanted" in capsys.readouterr().err


def test_every_flag_that_takes_a_list_takes_several_values():
    from veratune.cli.parsing import LISTS, parse
    from veratune.cli.serve_ import parser

    for name in COMMANDS:
        module = importlib.import_module(f"veratune.cli.{name.replace('-', '_')}_")
        for action in module.parser()._actions:
            kind = str(getattr(action, "_typehint", None))
            if "list[" in kind or "tuple[" in kind:
                assert action.dest in LISTS, f"{name}: {action.dest}"
    words = ["--model", "m", "--adapter-sources", "/a", "hf://b/", "--adapters", "a=F", "b=G,c=H"]
    flags = parse(parser(), [*words, "--port", "1"])
    assert (flags.adapter_sources, flags.port) == (["/a", "hf://b/"], 1)
    assert flags.adapters == ["a=F", "b=G", "c=H"]
    flags = parse(parser(), ["--model", "m", "--adapter-sources", "/a"])
    assert flags.adapter_sources == ["/a"]
    needed = ["--model", "m", "--task", "t", "--data", "d", "--out", "o"]
    train = importlib.import_module("veratune.cli.train_")
    flags = parse(train.parser(), ["--targets", "re:a{1,2}", "[b, c]", "d,e", *needed])
    assert flags.targets == ("re:a{1,2}", "b", "c", "d", "e")


def test_a_flag_that_is_given_twice_is_refused(capsys):
    status, _, said = run(capsys, "serve", "--model", "m", "--adapters", "a=F", "--adapters", "b=F")
    assert status == 2
    assert "--adapters is given twice; a list is written a,b or a b" in said


def test_a_recipe_is_settings_by_name_and_flags_overrule_it(capsys):
    from veratune.cli.parsing import RECIPES, parse
    from veratune.cli.train_ import parser

    needed = ["--model", "m", "--task", "t", "--data", "d", "--out", "o"]
    for name in RECIPES:
        flags = parse(parser(), ["--recipe", name, *needed])
        assert flags.targets
        assert flags.lr > 0
    flags = parse(parser(), ["--rank", "64", "--recipe", "spread", *needed])
    assert (flags.targets, flags.vectors, flags.rank) == (("all-linear",), "d", 64)
    for name in ("plan", "train-fleet"):
        module = importlib.import_module(f"veratune.cli.{name.replace('-', '_')}_")
        assert parse(module.parser(), ["--recipe", "spread", *needed]).vectors == "d"
    status, _, said = run(capsys, "train", "--recipe", "spraed", *needed)
    assert status == 2
    assert (
        "no recipe 'spraed'; there are balanced, best, paper, small, spread; did you mean 'spread'"
        in said
    )
