"""The command veratune judge."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from rich.console import Console

from veratune.cli.parsing import Parser, add_json, add_judge, new_parser, parse, print_json


def parser() -> Parser:
    out = new_parser(
        "judge",
        "Rate answers to MT-Bench or Vicuna questions with an LLM judge: the mean, from 1 to 10.",
    )
    out.add_argument(
        "--answers",
        type=str,
        required=True,
        help="JSON lines of question_id and turns, one answer a turn",
    )
    out.add_argument(
        "--questions",
        type=str,
        required=True,
        help="folder of FastChat's questions, reference answers and judge prompts",
    )
    out.add_argument(
        "--set",
        type=Literal["mt_bench", "vicuna"],
        default="mt_bench",
        help="question set of the folder",
    )
    add_judge(out)
    out.add_argument(
        "--cache",
        type=str,
        default="out/judge.jsonl",
        help="file of the judge's replies, which later runs reuse",
    )
    add_json(out)
    return out


def run(argv: Sequence[str]) -> int:
    flags = parse(parser(), argv)
    from veratune.scoring.judge import Judge, mean_rating, read_answers, read_questions

    questions = read_questions(Path(flags.questions), flags.set)
    judge = Judge(
        url=flags.judge_url, model=flags.judge_model, key=flags.judge_key, cache=Path(flags.cache)
    )
    notes = Console(stderr=True, highlight=False)
    with notes.status("rating") as status:
        score = mean_rating(
            judge,
            questions,
            read_answers(Path(flags.answers)),
            lambda done, total: status.update(f"rated {done} of {total}"),
        )
    if flags.json:
        print_json({"score": score, "judge": flags.judge_model, "questions": len(questions.turns)})
    else:
        print(f"{score:.2f} of 10 by {flags.judge_model}, {len(questions.turns)} questions")
    return 0
