import json

from veratune.analysis import calibrate
from veratune.cli.main import main
from veratune.ops.calibration import calibration_file, read_calibration
from veratune.ops.plans import PLANNER


def test_figures_are_measured_stored_and_read_again(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("VERATUNE_CACHE", str(tmp_path))
    monkeypatch.setattr(calibrate, "_SIDE", 64)
    assert main(["calibrate", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    stored = read_calibration()["cpu"]
    assert stored.flops == printed["flops"] > 0
    assert printed["file"] == str(calibration_file())
    assert main(["calibrate"]) == 0
    assert "GFLOP/s of a matrix product" in capsys.readouterr().out
    PLANNER.clear()
