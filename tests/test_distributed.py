"""DDP, FSDP2 and DeepSpeed on two gloo processes: gradients and adapter of one process."""

import importlib.util
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import veratune as vt
from tests import fakes
from tests.fakes import scramble
from veratune.formats import native
from veratune.model_state import vectors_of

SCRIPT = """
import sys, torch, torch.distributed as dist
import veratune as vt
from tests import fakes
from tests.fakes import scramble
from tests.test_distributed import TOKENS, loss, sgd, step

torch.set_num_threads(1)
dist.init_process_group("gloo")
rank, kind, path = dist.get_rank(), sys.argv[1], sys.argv[2]
model = scramble(vt.attach(fakes.llama(), vt.VeraConfig(rank=16, targets="all-linear"), "a"), "a").train()
own = TOKENS[rank * 2 : rank * 2 + 2]
if kind == "ddp":
    trained = torch.nn.parallel.DistributedDataParallel(model)
elif kind.startswith("zero"):
    import deepspeed
    deepspeed.init_distributed("gloo")
    zero = {"stage": int(kind[4]), "stage3_param_persistence_threshold": 500}  # weights are over it
    config = {"train_micro_batch_size_per_gpu": 2, "zero_optimization": zero,
              "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
    trained, *_ = deepspeed.initialize(model=model, optimizer=sgd(model), config=config)
    for _ in range(2):
        trained.backward(loss(trained, own))
        trained.step()
else:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    mesh = init_device_mesh("cpu", (2,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    trained = fully_shard(model, mesh=mesh)
if not kind.startswith("zero"):
    step(trained, own)
adapter = vt.extract(model, "a")
if rank == 0:
    vt.formats_write(adapter, path)
dist.destroy_process_group()
""".replace("vt.formats_write", "__import__('veratune.formats.native', fromlist=['x']).write")

TOKENS = torch.arange(2, 34).view(4, 8)


def sgd(model):
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)


def loss(model, tokens):
    return model(input_ids=tokens).logits.square().mean()


def step(model, tokens):
    """Two steps of plain gradient descent, so that the result is the gradients themselves."""
    optimizer = sgd(model)
    for _ in range(2):
        optimizer.zero_grad()
        loss(model, tokens).backward()
        optimizer.step()


def one_process():
    model = scramble(
        vt.attach(fakes.llama(), vt.VeraConfig(rank=16, targets="all-linear"), "a"), "a"
    ).train()
    before = [p.clone() for v in vectors_of(model, "a") for p in v.parameters()]
    step(model, TOKENS)
    after = [p for v in vectors_of(model, "a") for p in v.parameters()]
    assert any(not torch.allclose(a, b) for a, b in zip(before, after, strict=True))
    return vt.extract(model, "a")


def run_two(tmp_path, kind):
    script, path = tmp_path / "script.py", tmp_path / f"{kind}.safetensors"
    script.write_text(SCRIPT)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-addr", "127.0.0.1",
               "--master-port", str(port), str(script), kind, str(path)]  # fmt: skip
    here = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    env = os.environ | {
        "PYTHONPATH": here,
        "PYTHONWARNINGS": "ignore",
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
    }
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, env=env)
    assert done.returncode == 0, f"{kind}: {done.stderr[-3000:]}"
    return native.read(path), path


def check_equal(found, wanted, path):
    for layer in wanted.d:
        torch.testing.assert_close(found.d[layer], wanted.d[layer], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found.b[layer], wanted.b[layer], rtol=1e-5, atol=1e-6)
    assert torch.equal(found.base_fingerprint, wanted.base_fingerprint)  # of sharded weights
    vt.load(fakes.llama(), path)


def test_ddp_and_fsdp2_equal_one_process(tmp_path):
    wanted = one_process()
    for kind in ("ddp", "fsdp2"):
        found, path = run_two(tmp_path, kind)
        check_equal(found, wanted, path)


@pytest.mark.clients
@pytest.mark.parametrize("kind", ["zero2", "zero3"])
def test_deepspeed_equals_one_process(kind, tmp_path):
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("pip install deepspeed, which compiles its operations on first use")
    found, path = run_two(tmp_path, kind)
    check_equal(found, one_process(), path)
