"""A judge on a real HTTP server, through the openai client, and its replies replayed without it."""

import http.server
import json
import threading

import pytest

from veratune.cli.main import main
from veratune.errors import ConfigError, DataError, JudgeError
from veratune.scoring.judge import Judge, mean_rating, prompt, read_answers, read_questions


class Replies(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(body)
        status, text = self.server.reply(body)
        content = {"id": "1", "object": "chat.completion", "created": 0, "model": body["model"]}
        content["choices"] = [
            {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
        ]
        out = json.dumps(content if status == 200 else {"error": {"message": text}}).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(out)))
        self.end_headers()
        self.wfile.write(out)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    found = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Replies)
    found.asked, found.reply = [], lambda body: (200, "Good. Rating: [[7]]")
    thread = threading.Thread(target=found.serve_forever)
    thread.start()
    yield found
    found.shutdown()
    thread.join()
    found.server_close()


@pytest.fixture
def folder(tmp_path):
    """Two questions in FastChat's form; prompts of our own."""
    rows = [
        {"question_id": 1, "category": "writing", "turns": ["Write.", "Again."]},
        {"question_id": 2, "category": "math", "turns": ["1+1?", "+1?"]},
    ]
    references = [{"question_id": 2, "choices": [{"index": 0, "turns": ["2", "3"]}]}]
    names = {
        "single-v1": "{question} {answer}", "single-v1-multi-turn": "{question_1} {answer_1} {question_2} {answer_2}",
        "single-math-v1": "{question} {ref_answer_1} {answer}",
        "single-math-v1-multi-turn": "{question_1} {ref_answer_1} {question_2} {ref_answer_2} {answer_1} {answer_2}",
    }  # fmt: skip
    prompts = [
        {"name": name, "system_prompt": "Judge.", "prompt_template": text}
        for name, text in names.items()
    ]
    for name, lines in (
        ("mt_bench_questions", rows),
        ("mt_bench_reference_gpt4", references),
        ("judge_prompts", prompts),
    ):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "answers.jsonl").write_text(
        '{"question_id": 1, "turns": ["A", "B"]}\n{"question_id": 2, "turns": ["2", "4"]}\n'
    )
    return tmp_path


def judge(server, folder, **changes):
    port = server.server_address[1]
    return Judge(
        **{
            "url": f"http://127.0.0.1:{port}/v1",
            "model": "wise",
            "cache": folder / "cache.jsonl",
            **changes,
        }
    )


def test_every_turn_is_rated_once_and_replayed_without_the_judge(server, folder, monkeypatch):
    rated = iter((8, 6, 9, 2.5))
    server.reply = lambda body: (200, f"[[1]] was my first thought. [[{next(rated)}]]")
    questions, answers = read_questions(folder, "mt_bench"), read_answers(folder / "answers.jsonl")
    assert mean_rating(judge(server, folder), questions, answers) == (8 + 6 + 9 + 2.5) / 4
    assert [body["messages"][1]["content"] for body in server.asked] == [
        "Write. A", "Write. A Again. B", "1+1? 2 2", "1+1? 2 +1? 3 2 4"
    ]  # fmt: skip
    assert all(body["model"] == "wise" and body["temperature"] == 0 for body in server.asked)
    monkeypatch.delenv("OPENAI_API_KEY")
    assert mean_rating(judge(server, folder, url=None), questions, answers) == (8 + 6 + 9 + 2.5) / 4
    assert len(server.asked) == 4
    with pytest.raises(JudgeError, match="is not in .*cache.jsonl, and no judge to ask"):
        judge(server, folder, url=None, model="other").rate(prompt(questions, 1, ["A"], 0))


@pytest.mark.parametrize("reply", ["", "Rating: 7", "[[11]]", "[[0]]", "[[seven]]"])
def test_garbage_is_asked_for_again_then_an_error_that_shows_it(server, folder, reply):
    server.reply = lambda body: (200, reply)
    with pytest.raises(JudgeError, match=r"no rating from 1 to 10 as \[\[5\]\] in 3 replies"):
        judge(server, folder).rate([{"role": "user", "content": "x"}])
    assert len(server.asked) == 3
    assert not (folder / "cache.jsonl").exists()
    server.reply = lambda body: (200, "[[10]]")
    assert judge(server, folder).rate([{"role": "user", "content": "x"}]) == 10


def test_mistakes_name_what_to_do(server, folder, monkeypatch):
    server.reply = lambda body: (401, "no such key")
    with pytest.raises(JudgeError, match="could not be asked: .*no such key"):
        judge(server, folder).rate([])
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(ConfigError, match="environment variable OPENAI_API_KEY"):
        judge(server, folder).rate([])
    questions = read_questions(folder, "mt_bench")
    with pytest.raises(DataError, match="no answer to question 2; every turn wants one"):
        mean_rating(judge(server, folder), questions, {1: ["A", "B"], 2: ["2"]})
    with pytest.raises(DataError, match="vicuna_questions.jsonl: no such file"):
        read_questions(folder, "vicuna")
    (folder / "answers.jsonl").write_text('{"question_id": 1}\n')
    with pytest.raises(DataError, match="line 1 is not"):
        read_answers(folder / "answers.jsonl")
    (folder / "cache.jsonl").write_text("{}\n")
    with pytest.raises(DataError, match="line 1 is no reply"):
        judge(server, folder).rate([])


def test_the_command(server, folder, capsys):
    port = server.server_address[1]
    words = [
        "judge",
        "--answers",
        str(folder / "answers.jsonl"),
        "--questions",
        str(folder),
        "--cache",
        str(folder / "c.jsonl"),
        "--json",
    ]
    assert (
        main([*words, "--judge-url", f"http://127.0.0.1:{port}/v1", "--judge-model", "wise"]) == 0
    )
    assert json.loads(capsys.readouterr().out) == {"score": 7.0, "judge": "wise", "questions": 2}
    assert main([*words, "--judge-model", "wise"]) == 0
    assert len(server.asked) == 4
    capsys.readouterr()
    assert main([*words, "--judge-model", "other"]) == 1
    assert "give --judge-url" in capsys.readouterr().err
