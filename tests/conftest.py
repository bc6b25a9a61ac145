import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

# Examples are the same in every run, and a slow machine is not a failure.
settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.load_profile("repeatable")

DATA = Path(os.environ.get("VERATUNE_DATA", Path(__file__).parents[2] / "shared" / "data"))


@pytest.fixture(autouse=True)
def _fixed(monkeypatch, tmp_path_factory):
    monkeypatch.setenv("VERATUNE_CACHE", str(tmp_path_factory.getbasetemp() / "no-calibration"))
    torch.manual_seed(0)
    torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)


@pytest.fixture
def data() -> Path:
    """The folder of real data sets, or a skip: `data` tests run where it is."""
    if not DATA.is_dir():
        pytest.skip(f"no data sets at {DATA}; set VERATUNE_DATA to their folder")
    return DATA
