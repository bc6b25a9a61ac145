import dataclasses
import json

import pytest

import veratune as vt
from tests import fakes
from veratune.cli.eval_ import run
from veratune.errors import ConfigError, DataError, UnsupportedError
from veratune.inference.adapted import load_with_adapter
from veratune.inference.harness import run_harness
from veratune.tasks.registry import task_class

pytest.importorskip("lm_eval")
TASK = """
task: lights
dataset_path: json
dataset_kwargs:
  data_files: {data}
test_split: train
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: ["on", "off"]
doc_to_target: answer
metric_list:
  - metric: acc
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("harness")
    rows = [{"question": "turn the light", "answer": i % 2} for i in range(4)]
    (path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (path / "lights.yaml").write_text(TASK.format(data=path / "rows.jsonl"))
    model = fakes.llama()
    fakes.folder(model, path / "model")
    vt.attach(model, vt.VeraConfig(rank=4, targets=("all-linear",)), name="a")
    vt.save(fakes.scramble(model, "a"), path / "a.safetensors", name="a")
    return path


@pytest.mark.filterwarnings("ignore")  # lm-eval's own
def test_a_local_task_scores_base_and_adapter(folder, capsys):
    words = ["--model", str(folder / "model"), "--adapter", str(folder / "a.safetensors")]
    words += ["--task", "instruction", "--harness", str(folder / "lights.yaml"), "--device", "cpu"]
    assert run([*words, "--json"]) == 0
    scores = json.loads(capsys.readouterr().out)
    assert set(scores) == {"base", "adapter"}
    assert scores["base"]["lights acc"] == scores["adapter"]["lights acc"] == 0.5  # one prompt


@pytest.mark.filterwarnings("ignore")
def test_what_the_harness_cannot_do_is_refused(folder):
    loaded = load_with_adapter(str(folder / "model"), None, device="cpu")
    with pytest.raises(ConfigError, match="none.yaml: no such file"):
        run_harness(loaded, ["none.yaml"])
    broken = folder / "broken.yaml"
    broken.write_text(TASK.format(data=folder / "missing.jsonl").replace("lights", "broken"))
    with pytest.raises(DataError, match="could not run .*broken.yaml"):
        run_harness(loaded, [str(broken)])
    other = dataclasses.replace(loaded, task=task_class("text-regression")())
    with pytest.raises(UnsupportedError, match="the adapter's task is 'text-regression'"):
        run_harness(other, ["lights"])


def test_flags_that_are_not_read_are_refused(folder):
    words = ["--model", str(folder / "model")]
    with pytest.raises(ConfigError, match="give either --data or --harness"):
        run(words)
    with pytest.raises(ConfigError, match="--generate is set, but --harness does not read it"):
        run([*words, "--harness", "x.yaml", "--generate"])
    with pytest.raises(ConfigError, match="--limit is set, but --data does not read it"):
        run([*words, "--data", "x", "--limit", "3"])
