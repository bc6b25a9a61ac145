"""DDP and FSDP2 on two gloo processes: the gradients and the extracted adapter of one process."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import torch

import veratune as vt
from tests import fakes
from tests.fakes import scramble
from veratune.model_state import vectors_of

SCRIPT = """
import sys, torch, torch.distributed as dist
import veratune as vt
from tests import fakes
from tests.fakes import scramble
from tests.test_distributed import TOKENS, step

torch.set_num_threads(1)
dist.init_process_group("gloo")
rank, kind, path = dist.get_rank(), sys.argv[1], sys.argv[2]
model = scramble(vt.attach(fakes.llama(), vt.VeraConfig(rank=16, targets="all-linear"), "a"), "a").train()
own = TOKENS[rank * 2 : rank * 2 + 2]
if kind == "ddp":
    trained = torch.nn.parallel.DistributedDataParallel(model)
else:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    mesh = init_device_mesh("cpu", (2,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    trained = fully_shard(model, mesh=mesh)
step(trained, own)
adapter = vt.extract(model, "a")
if rank == 0:
    vt.formats_write(adapter, path)
dist.destroy_process_group()
""".replace("vt.formats_write", "__import__('veratune.formats.native', fromlist=['x']).write")

TOKENS = torch.arange(2, 34).view(4, 8)


def step(model, tokens):
    """Two steps of plain gradient descent, so that the result is the gradients themselves."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(2):
        optimizer.zero_grad()
        model(input_ids=tokens).logits.square().mean().backward()
        optimizer.step()


def test_ddp_and_fsdp2_equal_one_process(tmp_path):
    model = scramble(
        vt.attach(fakes.llama(), vt.VeraConfig(rank=16, targets="all-linear"), "a"), "a"
    ).train()
    before = [p.clone() for v in vectors_of(model, "a") for p in v.parameters()]
    step(model, TOKENS)
    wanted = vt.extract(model, "a")
    assert any(
        not torch.allclose(a, b)
        for a, b in zip(
            before, [p for v in vectors_of(model, "a") for p in v.parameters()], strict=True
        )
    )
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    for kind in ("ddp", "fsdp2"):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        path = tmp_path / f"{kind}.safetensors"
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-addr", "127.0.0.1",
                   "--master-port", str(port), str(script), kind, str(path)]  # fmt: skip
        env = {
            **os.environ,
            "PYTHONPATH": str(Path(__file__).parents[1]),
            "PYTHONWARNINGS": "ignore",
            "OMP_NUM_THREADS": "1",
        }
        done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=env)
        assert done.returncode == 0, f"{kind}: {done.stderr[-3000:]}"
        from veratune.formats import native

        found = native.read(path)
        for layer in wanted.d:
            torch.testing.assert_close(found.d[layer], wanted.d[layer], rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(found.b[layer], wanted.b[layer], rtol=1e-5, atol=1e-6)
        assert torch.equal(found.base_fingerprint, wanted.base_fingerprint)  # of sharded weights
        vt.load(fakes.llama(), path)
