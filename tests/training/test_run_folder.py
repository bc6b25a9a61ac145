"""The folder of a run: which checkpoint is whole."""

import json

import pytest
import torch

from tests import fakes
from veratune.config import VeraConfig
from veratune.training.methods import build_method
from veratune.training.run_folder import last_checkpoint


@pytest.fixture
def run(tmp_path):
    """Two whole checkpoints of a method."""
    method = build_method("vera", VeraConfig(rank=2, targets=("query",)), {})
    model = fakes.bert()
    method.prepare(model, (), {})
    for step in (2, 10):
        folder = tmp_path / f"checkpoint-{step}"
        method.write(model, folder)
        torch.save({"state": torch.zeros(64)}, folder / "optimizer.pt")
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    return tmp_path, method


def test_the_latest_whole_checkpoint_is_taken(run):
    folder, method = run
    assert last_checkpoint(folder, method).name == "checkpoint-10"
    (folder / "checkpoint-10" / "trainer_state.json").unlink()
    assert last_checkpoint(folder, method).name == "checkpoint-2"
    assert last_checkpoint(folder / "none", method) is None


@pytest.mark.parametrize("keep", [0, 10, 400, -1])
def test_a_truncated_optimizer_falls_back_to_the_older_checkpoint(run, keep):
    folder, method = run
    file = folder / "checkpoint-10" / "optimizer.pt"
    file.write_bytes(file.read_bytes()[:keep])
    assert last_checkpoint(folder, method).name == "checkpoint-2"


def test_a_flipped_byte_falls_back_too(run):
    folder, method = run
    file = folder / "checkpoint-10" / "optimizer.pt"
    stored = bytearray(file.read_bytes())
    at = stored.index(bytes(128))  # inside the zeros of the tensor
    stored[at + 64] ^= 1
    file.write_bytes(stored)
    assert last_checkpoint(folder, method).name == "checkpoint-2"
