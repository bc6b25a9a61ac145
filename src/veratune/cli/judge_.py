"""The command veratune judge."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from rich.console import Console

from veratune.cli.parsing import Parser, add_judge, new_parser, parse, print_json


def parser() -> Parser:
    out = new_parser(
        "judge",
        "The mean rating, 1 to 10, that a judge gives to answers to MT-Bench or Vicuna questions.",
    )
    out.add_argument(
        "--answers",
        type=str,
        required=True,
        help="jsonl of {question_id, turns}: an answer for each turn",
    )
    out.add_argument(
        "--questions",
        type=str,
        required=True,
        help="folder of FastChat's questions, references and judge_prompts.jsonl",
    )
    out.add_argument(
        "--set",
        type=Literal["mt_bench", "vicuna"],
        default="mt_bench",
        help="which questions of the folder",
    )
    add_judge(out)
    out.add_argument(
        "--cache",
        type=str,
        default="out/judge.jsonl",
        help="file of replies, which are not asked for again",
    )
    out.add_argument("--json", type=bool, default=False, help="print one JSON object")
    return out


def run(argv: Sequence[str]) -> int:
    flags = parse(parser(), argv)
    from veratune.scoring.judge import Judge, mean_rating, read_answers, read_questions

    questions = read_questions(Path(flags.questions), flags.set)
    judge = Judge(
        url=flags.judge_url, model=flags.judge_model, key=flags.judge_key, cache=Path(flags.cache)
    )
    notes = Console(stderr=True, highlight=False)
    with notes.status("asking") as line:
        score = mean_rating(
            judge,
            questions,
            read_answers(Path(flags.answers)),
            lambda done, of: line.update(f"rated {done} of {of}"),
        )
    if flags.json:
        print_json({"score": score, "judge": flags.judge_model, "questions": len(questions.turns)})
    else:
        print(f"{score:.2f} of 10 by {flags.judge_model}, {len(questions.turns)} questions")
    return 0
