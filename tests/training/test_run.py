import dataclasses
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from transformers import TrainerCallback

import veratune as vt
from tests import fakes
from veratune.errors import ConfigError, DataError, InterruptedRunError, OutputError
from veratune.formats import native
from veratune.inference.adapted import load_with_adapter
from veratune.inference.evaluate import evaluate, evaluate_with_base
from veratune.training.methods import VeraMethod
from veratune.training.run import train
from veratune.training.settings import TrainSettings
from veratune.training.sweep import sweep
from veratune.training.trainer import VeraTrainer

pytestmark = pytest.mark.filterwarnings("ignore")
VERA = vt.VeraConfig(rank=16, targets="all-linear")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with tiny models and data: sentiment by words, and sentences to answers."""
    out = tmp_path_factory.mktemp("place")
    fakes.folder(fakes.bert(), out / "bert")
    fakes.folder(fakes.llama(), out / "llama")
    fakes.folder(
        fakes.llama(hidden_size=64, intermediate_size=128, num_key_value_heads=4), out / "wide"
    )
    rng = random.Random(0)
    good, bad = ["good", "great", "love"], ["bad", "awful", "hate"]
    for split, count in (("train", 48), ("validation", 16)):
        rows = []
        for i in range(count):
            words = [rng.choice(["this", "film", "movie", "is", "a"]) for _ in range(4)] + [
                rng.choice(good if i % 2 else bad)
            ]
            rng.shuffle(words)
            rows.append(
                {
                    "text": " ".join(words),
                    "label": "plus" if i % 2 else "minus",
                    "score": float(i % 2),
                }
            )
        (out / "sentiment").mkdir(exist_ok=True)
        (out / "sentiment" / f"{split}.jsonl").write_text(
            "".join(json.dumps(r) + "\n" for r in rows)
        )
    rows = [{"prompt": f"light {x}", "completion": f"set {x}"} for x in ("on", "off")] * 12
    (out / "talk.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (out / "text.txt").write_text("turn the light on please\n" * 40)
    return out


def settings(place, out, **changes):
    base = {
        "model": str(place / "bert"), "task": "text-classification", "data": str(place / "sentiment"), "out": str(out),
        "lr": 3e-2, "head_lr": 1e-2, "batch_size": 8, "epochs": 3, "max_length": 16, "device": "cpu", "preview": 0,
    }  # fmt: skip
    if changes.get("task") in ("instruction", "causal-lm"):
        del base["head_lr"]  # these tasks train no head
    return TrainSettings(**(base | changes))


def same_bits(one: Path, two: Path) -> bool:
    return (one / "adapter.safetensors").read_bytes() == (two / "adapter.safetensors").read_bytes()


def test_classification_learns_and_the_file_knows_its_task(place, tmp_path):
    result = train(settings(place, tmp_path / "run", lr=0.1, head_lr=5e-2, epochs=20), VERA)
    assert result.after["accuracy"] >= result.before["accuracy"] + 0.25
    assert result.bytes == Path(result.path).stat().st_size
    adapter = native.read(result.path)
    assert adapter.task["labels"] == ["minus", "plus"]
    assert result.trained == adapter.trained_values
    assert result.head == sum(t.numel() for t in adapter.head.values()) == 2 * 32 + 2
    loaded = load_with_adapter(str(place / "bert"), result.path, device="cpu")
    base, after = evaluate_with_base(loaded, str(place / "sentiment"))
    assert after["accuracy"] == result.after["accuracy"] > base["accuracy"]
    run = yaml.safe_load((tmp_path / "run" / "run.yaml").read_text())
    assert run["rank"] == 16
    assert json.loads((tmp_path / "run" / "results.json").read_text())["after"] == result.after
    checkpoints = list((tmp_path / "run" / "checkpoints").iterdir())
    assert 1 <= len(checkpoints) <= 2
    assert not any(
        p.name in ("model.safetensors", "pytorch_model.bin")
        for c in checkpoints
        for p in c.iterdir()
    )


def test_regression_does_not_depend_on_the_units_of_its_targets(place, tmp_path):
    rows = [json.loads(line) for line in (place / "sentiment" / "train.jsonl").open()]
    found = {}
    for unit, (scale, shift) in {"small": (1.0, 0.0), "large": (1000.0, 7000.0)}.items():
        folder = tmp_path / unit
        folder.mkdir()
        scored = [row | {"score": scale * row["score"] + shift} for row in rows]
        for split in ("train", "validation"):
            text = "".join(json.dumps(row) + "\n" for row in scored)
            (folder / f"{split}.jsonl").write_text(text)
        found[unit] = train(
            settings(
                place, tmp_path / f"{unit}-run", task="text-regression", data=str(folder),
                columns={"label": "score"}, epochs=4, max_grad_norm=0.0,
            ),
            VERA,
        )  # fmt: skip
    small, large = found["small"], found["large"]
    assert large.after["pearson"] == pytest.approx(small.after["pearson"], abs=1e-2)
    assert large.after["mse"] == pytest.approx(1e6 * small.after["mse"], rel=2e-2)
    assert large.loss == pytest.approx(small.loss, rel=2e-2)
    assert small.after["mse"] < small.before["mse"]


def test_regression_and_language_tasks_learn(place, tmp_path):
    result = train(
        settings(
            place, tmp_path / "a", task="text-regression", columns={"label": "score"}, epochs=8
        ),
        VERA,
    )
    assert result.after["mse"] < result.before["mse"]
    conversation = {
        "model": str(place / "llama"),
        "task": "instruction",
        "data": str(place / "talk.jsonl"),
        "eval_data": str(place / "talk.jsonl"),
    }
    result = train(
        settings(place, tmp_path / "b", **conversation, max_length=40, lr=0.1, epochs=40),
        dataclasses.replace(VERA, rank=64),
    )
    assert result.after["loss"] < 0.3 * result.before["loss"]
    loaded = load_with_adapter(str(place / "llama"), result.path, device="cpu")
    scores = evaluate(loaded, str(place / "talk.jsonl"), generate=True, max_new_tokens=8)
    assert scores["exact_match"] == 1.0
    text = {
        "model": str(place / "llama"),
        "task": "causal-lm",
        "data": str(place / "text.txt"),
        "eval_data": str(place / "text.txt"),
    }
    result = train(settings(place, tmp_path / "c", **text, epochs=6), VERA)
    assert result.after["loss"] < result.before["loss"]


@pytest.mark.parametrize(
    "base", [{"quantize": "4bit"}, {"quantize": "8bit"}, {"base_dtype": "bfloat16"}]
)
def test_a_base_of_few_bits_is_trained_through(place, tmp_path, base):
    changes = {
        "model": str(place / "wide"),
        "task": "instruction",
        "data": str(place / "talk.jsonl"),
        "eval_data": str(place / "talk.jsonl"),
    }
    result = train(
        settings(place, tmp_path / "q", **changes, max_length=40, epochs=8, **base), VERA
    )
    assert result.after["loss"] < result.before["loss"]
    assert {v.dtype for v in native.read(result.path).d.values()} == {torch.float32}


def test_equal_runs_give_equal_bytes_and_seeds_differ(place, tmp_path):
    for name, changes in (
        ("a", {}),
        ("b", {}),
        ("c", {"seed": 1}),
        ("d", {"gradient_checkpointing": True}),
    ):
        train(settings(place, tmp_path / name, epochs=1, **changes), VERA)
    assert same_bits(tmp_path / "a", tmp_path / "b")
    assert same_bits(tmp_path / "a", tmp_path / "d")
    assert not same_bits(tmp_path / "a", tmp_path / "c")


RUN = """
import json, sys
from veratune.config import VeraConfig
from veratune.training.run import train
from veratune.training.settings import TrainSettings
import torch
torch.set_num_threads(1)
train(TrainSettings(**json.loads(sys.argv[1])), VeraConfig(**json.loads(sys.argv[2])))
"""


def start(one: TrainSettings, prefix=(), vera=None) -> subprocess.Popen:
    words = [*(prefix or [sys.executable]), *([] if prefix else ["-c", RUN])]
    config = vera or {"rank": 16, "targets": ["all-linear"], "dropout": 0.1}
    env = {**os.environ, "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*words, json.dumps(dataclasses.asdict(one)), json.dumps(config)],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def finish(process: subprocess.Popen) -> None:
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors.decode()[-3000:]


@pytest.mark.parametrize("kills", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_resume_after_kill_ends_with_the_bits_of_an_unbroken_run(place, tmp_path, kills):
    changes = {"epochs": 6, "save_steps": 2}
    whole, broken = (
        settings(place, tmp_path / "whole", **changes),
        settings(place, tmp_path / "broken", **changes),
    )
    finish(start(whole))
    for kill in range(kills):
        process = start(dataclasses.replace(broken, resume=kill > 0))
        wanted = f"checkpoint-{4 * (kill + 1)}"
        deadline = time.monotonic() + 120
        while not (tmp_path / "broken" / "checkpoints" / wanted / "adapter.safetensors").exists():
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    finish(start(dataclasses.replace(broken, resume=True)))
    assert same_bits(tmp_path / "whole", tmp_path / "broken")
    whole_result, result = (
        json.loads((tmp_path / n / "results.json").read_text()) for n in ("whole", "broken")
    )
    assert (result["before"], result["after"]) == (whole_result["before"], whole_result["after"])


def test_a_checkpoint_that_was_cut_off_is_passed_over(place, tmp_path):
    one = settings(place, tmp_path / "run", epochs=2, save_steps=3)
    train(one, VERA)
    first = (tmp_path / "run" / "adapter.safetensors").read_bytes()
    last = max(
        (tmp_path / "run" / "checkpoints").iterdir(), key=lambda p: int(p.name.split("-")[1])
    )
    (last / "trainer_state.json").write_text("{")
    train(dataclasses.replace(one, resume=True), VERA)
    assert (tmp_path / "run" / "adapter.safetensors").read_bytes() == first


def test_two_processes_give_the_result_of_one(place, tmp_path):
    """The same global batch on 2 gloo processes: equal to 1e-5."""
    script = tmp_path / "script.py"
    script.write_text(RUN)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-addr", "127.0.0.1",
                "--master-port", str(port), str(script)]  # fmt: skip
    vera = {"rank": 16, "targets": ["all-linear"]}
    for task in ("text-classification", "instruction"):
        changes = {"epochs": 3.0, "keep": "last"}
        if task == "instruction":
            changes |= {
                "model": str(place / "llama"),
                "data": str(place / "talk.jsonl"),
                "max_length": 40,
            }
        one = settings(place, tmp_path / f"{task}1", task=task, batch_size=8, **changes)
        two = settings(place, tmp_path / f"{task}2", task=task, batch_size=4, **changes)
        finish(start(one, vera=vera))
        finish(start(two, torchrun, vera))
        a, b = (native.read(tmp_path / f"{task}{n}" / "adapter.safetensors") for n in (1, 2))
        for layer in a.d:
            torch.testing.assert_close(a.d[layer], b.d[layer], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(a.b[layer], b.b[layer], rtol=1e-5, atol=1e-5)
        for name in a.head:
            torch.testing.assert_close(a.head[name], b.head[name], rtol=1e-5, atol=1e-5)


def test_sweep_ranks_and_resumes(place, tmp_path):
    one = settings(place, tmp_path / "s", epochs=2)
    ranked = sweep(one, VERA, {"lr": [1e-6, 3e-2], "rank": [8]})
    accuracy = [result.after["accuracy"] for _, result in ranked]
    assert accuracy == sorted(accuracy, reverse=True)
    best = (tmp_path / "s" / "adapter.safetensors").read_bytes()
    assert best == Path(ranked[0][1].path).read_bytes()
    again = sweep(one, VERA, {"lr": [1e-6, 3e-2], "rank": [8]})
    assert [r for _, r in again] == [r for _, r in ranked]
    with pytest.raises(
        ConfigError, match="sweep names 'lrr', which is no setting; did you mean 'lr'"
    ):
        sweep(one, VERA, {"lrr": [1]})


def test_early_stopping_and_the_last_adapter(place, tmp_path):
    stopped = train(
        settings(place, tmp_path / "a", lr=1e-12, head_lr=0.0, epochs=8, patience=2), VERA
    )
    assert stopped.steps == 18  # three evaluations: one to set the score, two without a better one
    last = train(
        settings(place, tmp_path / "b", epochs=1, keep="last", report_to=["tensorboard"]), VERA
    )
    assert last.steps == 6
    assert list((tmp_path / "b").rglob("events.out.*"))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"task": "txt-classification"},
            ConfigError,
            "unknown task 'txt-classification'; .*did you mean 'text-classification'",
        ),
        ({"columns": {"label": "nope"}}, DataError, "no column 'nope' for label"),
        ({"model": "/nowhere"}, DataError, "base model '/nowhere' cannot be loaded"),
        (
            {"patience": 2, "eval_split": "test"},
            ConfigError,
            "patience stops on an evaluation score",
        ),
        (
            {"model": "LLAMA", "task": "causal-lm", "data": "TEXT", "method": "head"},
            ConfigError,
            "method is 'head', but the task has no output of its own to train; use another method",
        ),
        (
            {"system": "x"},
            ConfigError,
            "system is set, but task 'text-classification' does not take it",
        ),
        (
            {"task": "text-regression", "columns": {"label": "score"}, "label_smoothing": 0.1},
            ConfigError,
            "of task 'text-regression' is no cross entropy",
        ),
        (
            {"method": "lora"},
            ConfigError,
            "unknown method 'lora'; there are vera, head, bitfit, full, houlsby.* and peft:NAME",
        ),
        ({"resume": True}, OutputError, r"there is no run to resume \(no run.yaml\)"),
    ],
)
def test_mistakes_are_found_before_anything_is_written(place, tmp_path, changes, error, message):
    named = {"LLAMA": str(place / "llama"), "TEXT": str(place / "text.txt")}
    changes = {
        key: named.get(value, value) if isinstance(value, str) else value
        for key, value in changes.items()
    }
    with pytest.raises(error, match=message):
        train(
            settings(place, tmp_path / "run", **changes),
            vt.VeraConfig() if "method" in changes else VERA,
        )
    assert not (tmp_path / "run").exists()


def test_an_output_folder_in_use_and_a_changed_run(place, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine").write_text("precious")
    with pytest.raises(
        OutputError,
        match="the output folder is not empty .*; choose another, empty it, or go on with --resume true",
    ):
        train(settings(place, tmp_path / "run"), VERA)
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["mine"]
    train(settings(place, tmp_path / "b", epochs=1), VERA)
    with pytest.raises(
        ConfigError, match="the run was started with lr = 0.03, not 0.5; resume it unchanged"
    ):
        train(settings(place, tmp_path / "b", epochs=1, lr=0.5, resume=True), VERA)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": float("nan")}, "lr is nan; it must be a finite number of at least 0"),
        ({"batch_size": 0}, "batch_size is 0; it must be at least 1"),
        (
            {"warmup_ratio": 1.5},
            r"warmup_ratio is 1.5; it is a share of all steps, in \[0, 1\)",
        ),
        ({"label_smoothing": 1.0}, r"label_smoothing is 1.0; it is a weight, in \[0, 1\)"),
        ({"b_lr": 0.1, "method": "full"}, "b_lr is set, but method 'full' has no vectors b"),
        ({"b_lr": -1.0}, "b_lr is -1.0; it must be a finite number of at least 0"),
        ({"epochs": 0}, "epochs and max_steps are both 0"),
        (
            {"lr": 0.0},
            "lr is 0, with which method 'vera' trains nothing beside the head; for the head alone take method head",
        ),
        ({"options": {"r": 8}}, "options is set to {'r': 8}, but method 'vera' takes none"),
    ],
)
def test_bad_settings(place, tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        settings(place, tmp_path, **changes)


def test_adalora_prunes_to_its_budget_within_the_run(place, tmp_path):
    options = {"init_r": 4, "target_r": 2, "deltaT": 1}
    run = settings(
        place,
        tmp_path / "run",
        method="peft:adalora",
        options=options,
        epochs=6,
        lr=5e-2,
        keep="last",
    )
    vera = vt.VeraConfig(targets=("query", "value"))
    train(run, vera)
    from safetensors.torch import load_file

    kept = [
        (t != 0).sum().item()
        for n, t in load_file(tmp_path / "run" / "trained.safetensors").items()
        if "lora_E" in n
    ]
    assert len(kept) == 4  # query and value of two blocks
    assert sum(kept) == 4 * 2  # of 4 * 4 at the start


def test_every_method_trains_on_the_same_loop(place, tmp_path):
    for method in ("houlsby", "dylora", "lora-fa", "peft:vera"):
        options = {"r": 4} if method in ("lora-fa", "peft:vera") else {}
        vera = vt.VeraConfig(targets=("query", "value") if method != "houlsby" else None)
        result = train(
            settings(
                place, tmp_path / method.replace(":", "-"), method=method, options=options, epochs=1
            ),
            vera,
        )
        assert result.trained > 0
        assert Path(result.path).name == "trained.safetensors"


def test_mixed_precision_and_smoothed_targets(place, tmp_path):
    plain = train(settings(place, tmp_path / "a", epochs=2), VERA)
    mixed = train(settings(place, tmp_path / "b", epochs=2, mixed_precision="bf16"), VERA)
    assert mixed.after["loss"] == pytest.approx(plain.after["loss"], rel=0.05)
    assert not same_bits(tmp_path / "a", tmp_path / "b")
    smooth = train(
        settings(place, tmp_path / "c", epochs=2, label_smoothing=0.3, group_by_length=True), VERA
    )
    loaded = load_with_adapter(str(place / "bert"), smooth.path, device="cpu")
    rows = loaded.task.encode(
        loaded.task.load_examples(str(place / "sentiment"), "validation"), loaded.processor
    )
    log = torch.log_softmax(
        loaded.model(
            **loaded.processor.pad(rows.remove_columns("labels")[:], return_tensors="pt")
        ).logits,
        -1,
    )
    hard = -log.gather(1, torch.tensor(rows["labels"])[:, None]).mean()
    assert smooth.after["loss"] == pytest.approx((0.7 * hard - 0.3 * log.mean()).item(), rel=1e-3)
    assert abs(smooth.after["loss"] - hard.item()) > 1e-3


def test_the_vectors_b_may_have_a_learning_rate_of_their_own(place, tmp_path):
    """Adam's first step is the learning rate itself, so one step shows it."""
    train(
        settings(
            place,
            tmp_path / "run",
            max_steps=1,
            lr=1e-2,
            b_lr=4e-2,
            warmup_ratio=0,
            lr_scheduler="constant_with_warmup",
        ),
        VERA,
    )
    adapter = native.read(tmp_path / "run" / "adapter.safetensors")
    moved_d = max((d - adapter.config.start_d).abs().max().item() for d in adapter.d.values())
    moved_b = max(b.abs().max().item() for b in adapter.b.values())
    assert moved_b == pytest.approx(4e-2, rel=1e-3)
    assert moved_d == 0 or moved_d == pytest.approx(
        1e-2, rel=1e-3
    )  # d has no gradient while b is 0
    trained = {p.name for p in (tmp_path / "run").iterdir()}
    assert "results.json" in trained


def test_warmup_in_steps(place, tmp_path):
    train(
        settings(
            place,
            tmp_path / "run",
            max_steps=12,
            warmup_steps=12,
            lr_scheduler="constant_with_warmup",
        ),
        VERA,
    )
    state = json.loads(
        next((tmp_path / "run" / "checkpoints").rglob("trainer_state.json")).read_text()
    )
    rates = [entry["learning_rate"] for entry in state["log_history"] if "learning_rate" in entry]
    assert rates[0] == pytest.approx(3e-2 * 9 / 12, rel=0.15)


class SignalAt(TrainerCallback):
    """Sends a signal to this process in one step."""

    def __init__(self, step, number):
        self.step, self.number = step, number

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_writes_a_checkpoint_to_resume_from(place, tmp_path, number):
    changes = {"max_steps": 8, "eval_data": None, "data": str(place / "sentiment" / "train.jsonl")}
    changes |= {"ignore_columns": ["score"]}
    whole = train(settings(place, tmp_path / "whole", **changes), VERA)
    broken = settings(place, tmp_path / "broken", **changes)
    method = VeraMethod(dataclasses.replace(VERA, seed=broken.basis_seed))
    method.callbacks = [SignalAt(2, number)]
    former = signal.getsignal(number)
    with pytest.raises(
        InterruptedRunError, match=f"{number.name} ended the run; a checkpoint of step 3"
    ):
        train(broken, VERA, method=method)
    assert signal.getsignal(number) is former
    assert (tmp_path / "broken" / "checkpoints" / "checkpoint-3").is_dir()
    resumed = train(dataclasses.replace(broken, resume=True), VERA)
    assert resumed.steps == whole.steps == 8
    assert same_bits(tmp_path / "whole", tmp_path / "broken")


@pytest.mark.parametrize(
    "error",
    [OSError(28, "No space left on device"), RuntimeError("PytorchStreamWriter failed writing")],
)
def test_a_full_disk_ends_a_checkpoint_in_one_line(place, tmp_path, monkeypatch, error):
    def full(*args, **kwargs):
        raise error

    monkeypatch.setattr(VeraTrainer, "_save_optimizer_and_scheduler", full)
    with pytest.raises(OutputError, match="the checkpoint of step 2 could not be written: "):
        train(settings(place, tmp_path / "run", max_steps=2, save_steps=2), VERA)
