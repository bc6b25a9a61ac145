import json

import pytest

import veratune as vt
from tests import fakes
from veratune.cli.report_ import run
from veratune.errors import DataError
from veratune.training.run import train
from veratune.training.settings import TrainSettings


def test_a_report_shows_scores_curves_mask_and_samples(tmp_path, capsys):
    rows = [{"prompt": "turn <b>", "completion": "light on"}] * 4
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    folder = tmp_path / "run"
    settings = TrainSettings(
        model=fakes.folder(fakes.llama(), tmp_path / "model"), task="instruction", data=str(tmp_path / "rows.jsonl"),
        eval_data=str(tmp_path / "rows.jsonl"), out=str(folder), batch_size=4, max_length=64, epochs=2, device="cpu", preview=0,
    )  # fmt: skip
    result = train(settings, vt.VeraConfig(rank=4))
    assert run(["--run", str(folder), "--samples", "2", "--max-new-tokens", "4"]) == 0
    page = (folder / "report.html").read_text()
    assert str(folder / "report.html") in capsys.readouterr().out
    assert f"{result.before['loss']:.4f}</td><td>{result.after['loss']:.4f}" in page
    assert "turn &lt;b&gt;" in page
    assert "<b>" not in page
    assert "<mark>light on&lt;/s&gt;</mark>" in page
    assert page.count("data:image/png;base64,") == 1
    assert "<th>adapter</th>" in page
    run(["--run", str(folder), "--samples", "0"])
    assert "<th>adapter</th>" not in (folder / "report.html").read_text()


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(DataError, match="no run.yaml; the folder of a finished run is wanted"):
        run(["--run", str(tmp_path)])
