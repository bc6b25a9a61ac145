"""Rows for `veratune train` and `veratune eval` from MetaMathQA and GSM8K, in the format of PEFT's comparison.

    python benchmarks/metamathqa/prepare.py --out rows

Both come from the hub (meta-math/MetaMathQA, openai/gsm8k), or from --metamathqa and --gsm8k, files that `datasets`
reads. As in PEFT's comparison, pairs over 1,300 characters are left out. `--held-out` of the others choose the learning rate.
"""

import argparse
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from datasets import load_dataset

LONGEST = 1300  # characters of a query and its response
PROMPT = "Question: {} Think step by step.\nAnswer:"


def train_rows(rows: Iterable[Mapping[str, str]]) -> Iterator[dict[str, str]]:
    """Prompts and completions of MetaMathQA's pairs."""
    for row in rows:
        if len(f"{row['query']} {row['response']}") <= LONGEST:
            yield {"prompt": PROMPT.format(row["query"]), "completion": row["response"]}


def test_rows(rows: Iterable[Mapping[str, str]]) -> Iterator[dict[str, str]]:
    """Prompts and final numbers of GSM8K's questions."""
    for row in rows:
        answer = row["answer"].rpartition("####")[2].strip().replace(",", "")
        yield {"prompt": PROMPT.format(row["question"]), "answer": answer}


def write(file: Path, rows: Iterable[Mapping[str, str]]) -> None:
    """JSON lines."""
    with file.open("w") as out:
        out.writelines(json.dumps(row) + "\n" for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--metamathqa", help="JSON lines instead of the hub's")
    parser.add_argument("--gsm8k", help="JSON lines of the test split instead of the hub's")
    parser.add_argument("--held-out", type=int, default=500, help="rows that are not trained on")
    flags = parser.parse_args()
    flags.out.mkdir(parents=True, exist_ok=True)
    if flags.metamathqa:
        train = load_dataset("json", data_files=flags.metamathqa, split="train")
    else:
        train = load_dataset("meta-math/MetaMathQA", split="train")
    if flags.gsm8k:
        test = load_dataset("json", data_files=flags.gsm8k, split="train")
    else:
        test = load_dataset("openai/gsm8k", "main", split="test")
    pairs = list(train_rows(train.shuffle(seed=0)))
    write(flags.out / "train.jsonl", pairs[flags.held_out :])
    write(flags.out / "held_out.jsonl", pairs[: flags.held_out])
    write(flags.out / "gsm8k.jsonl", test_rows(test))


if __name__ == "__main__":
    main()
