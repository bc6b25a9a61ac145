"""lm-eval through the server gives the log-likelihoods of lm-eval on the model itself."""

import json
import sys
import tempfile
from pathlib import Path

import lm_eval
from lm_eval.tasks import TaskManager

url, base, merged = sys.argv[1:]
ROWS = [
    ("The capital of France is", [" Paris", " London", " a small river"], 0),
    ("Water is made of hydrogen and", [" iron", " oxygen", " paper"], 1),
    ("Two plus two is", [" five", " four", " purple"], 1),
    ("A cat is", [" an animal", " a number", " a kind of music"], 0),
    ("Snow is white, and grass is", [" green", " naïve", " 日本"], 0),
    ("She opened the door and", [" walked in", " sang the ceiling", " blue"], 0),
]
TASK = """
task: small_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: label
target_delimiter: ""
metric_list: [{{metric: acc}}]
"""


def likelihoods(folder, kind, arguments):
    found = lm_eval.simple_evaluate(
        model=kind,
        model_args=arguments,
        tasks=["small_choice"],
        task_manager=TaskManager(include_path=folder, include_defaults=False),
        log_samples=True,
        bootstrap_iters=0,
        batch_size=2,
    )
    rows = found["samples"]["small_choice"]
    return [
        (float(score), str(greedy)) for row in rows for ((score, greedy),) in row["resps"]
    ], found["results"]["small_choice"]["acc,none"]


with tempfile.TemporaryDirectory() as folder:
    data = Path(folder) / "rows.jsonl"
    keys = ("question", "choices", "label")
    data.write_text("".join(json.dumps(dict(zip(keys, r, strict=True))) + "\n" for r in ROWS))
    (Path(folder) / "small_choice.yaml").write_text(TASK.format(data=data))
    for name, path in (("tuned", merged), ("smollm2", base)):
        served = {
            "model": name,
            "base_url": url + "/v1/completions",
            "tokenizer": base,
            "tokenizer_backend": "huggingface",
            "max_retries": 1,
            "timeout": 900,
        }
        through, accuracy = likelihoods(folder, "local-completions", served)
        direct, wanted = likelihoods(
            folder, "hf", {"pretrained": path, "dtype": "float32", "device": "cpu"}
        )
        largest = max(abs(a - b) for (a, _), (b, _) in zip(through, direct, strict=True))
        print(name, len(direct), "log-likelihoods, largest difference", largest, flush=True)
        assert largest < 1e-3
        assert [greedy for _, greedy in through] == [greedy for _, greedy in direct]
        assert accuracy == wanted
print("ok")
