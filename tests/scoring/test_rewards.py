"""Rewards: what each counts, and a sample on which one fails."""

import math
import socket
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from veratune.errors import ConfigError, DataError, RewardError
from veratune.scoring.rewards import CheckedReward, code_of, columns_of, find_reward
from veratune.scoring.sandbox import run_tests

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def turns(*texts):
    return [[{"role": "assistant", "content": text}] for text in texts]


def test_exact_match_takes_messages_and_text():
    reward = find_reward("exact-match")
    assert reward(turns(" 12 ", "12.", ""), answer=[12, "12", "x"]) == [1.0, 0.0, 0.0]
    assert reward(["a"], answer=["a"]) == [1.0]


def test_regex_matches_the_whole_completion_in_linear_time():
    reward = find_reward("regex")
    assert reward(turns("12", "12 apples"), pattern=["[0-9]+"] * 2) == [1.0, 0.0]
    assert reward(turns("a" * 30_000 + "!"), pattern=["(a+)+"]) == [0.0]
    with pytest.raises(DataError, match="no RE2 expression"):
        reward(turns("x"), pattern=["("])


def test_json_schema_counts_json_and_validity():
    pytest.importorskip("jsonschema", reason="needs jsonschema (the extra post)")
    reward = find_reward("json-schema")
    schema = '{"type": "object", "required": ["room"]}'
    texts = ('{"room": 1}', '```json\n{"room": 1}\n```', "[]", "none", "[" * 5_000)
    assert reward(turns(*texts), schema=[schema] * 5) == [1.0, 1.0, 0.2, 0.0, 0.0]
    with pytest.raises(DataError, match="no JSON schema"):
        reward(turns("1"), schema=['{"type": 3}'])


def test_math_is_equal_as_mathematics():
    pytest.importorskip("math_verify", reason="needs math-verify (the extra post)")
    reward = find_reward("math")
    texts = ("It is $\\frac{1}{2}$.", "0.5", "The answer is 2", "no idea")
    assert reward(turns(*texts), answer=["1/2", "1/2", "3", "4"]) == [1.0, 1.0, 0.0, 0.0]


def test_code_is_scored_by_the_tests_that_pass():
    reward = find_reward("code-tests")
    good = "Here:\n```python\ndef add(a, b):\n    return a + b\n```"
    half = "def add(a, b):\n    return 3"
    tests = ["assert add(1, 2) == 3", "assert add(2, 2) == 4"]
    assert reward(turns(good, half), tests=[tests, tests]) == [1.0, 0.5]
    assert reward(turns(good), tests=["assert add(1, 1) == 2"]) == [1.0]


@pytest.mark.parametrize(
    "code",
    [
        "raise ValueError",
        "import os; os._exit(0)",
        "x = bytearray(2**31)",
        "open('big', 'wb').write(b'x' * 2**22)",
        "this is no Python",
        "x = 1 # " + "y" * 200_000,
    ],
)
def test_code_that_breaks_a_limit_passes_nothing(code):
    assert run_tests(f"{code}\nready = True", ["assert ready"]) == 0.0


def test_code_that_loops_or_sleeps_is_ended():
    assert run_tests("while True: pass", ["pass"], timeout=1.0) == 0.0
    assert run_tests("import time; time.sleep(60)", ["pass"], timeout=1.0) == 0.0


def test_code_has_no_environment_and_an_empty_folder():
    seen = "import os\nseen = dict(os.environ), os.listdir('.')"
    assert run_tests(seen, ["assert not seen[0].get('PATH')", "assert seen[1] == []"]) == 1.0


@pytest.mark.skipif(
    subprocess.run(["unshare", "--net", "true"], capture_output=True).returncode != 0,
    reason="the kernel allows no new network namespace here",
)
def test_code_has_no_network():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        code = f"import socket\nsocket.create_connection(('127.0.0.1', {port}), timeout=2)"
        assert run_tests(code, ["pass"]) == 0.0


@settings(max_examples=50, deadline=None)
@given(st.text("ab`\n", max_size=40))
def test_code_of_a_text_is_a_part_of_it(text):
    assert code_of(text) in text


def test_a_function_is_found_by_its_module(tmp_path, monkeypatch):
    (tmp_path / "my_reward_module.py").write_text(
        "def f(completions, **kwargs): return [1.0]\nx = 1\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert columns_of(find_reward("my_reward_module:f")) is None
    for name, message in (
        ("my_reward_module:x", "is a int"),
        ("my_reward_module:g", "cannot be imported"),
        ("exact-mach", "exact-match"),
    ):
        with pytest.raises(ConfigError, match=message):
            find_reward(name)
    assert columns_of(find_reward("exact-match")) == {"answer"}


def failing(completions, answer):
    return [math.nan if a == "bad" else 1.0 for a in answer]


def raising(completions, answer):
    return [1 / (a != "bad") for a in answer]


@pytest.mark.parametrize("function", [failing, raising])
def test_a_failing_sample_is_named_and_stops_or_is_skipped(function):
    call = {"prompts": turns("p0", "p1"), "completions": turns("c0", "c1"), "answer": ["a", "bad"]}
    with pytest.raises(
        RewardError, match=r"'mine' (returned nan|raised Zero.*) for .*'c1' of .*'p1'"
    ):
        CheckedReward("mine", function)(**call)
    with pytest.warns(UserWarning, match="counts as no reward"):
        assert CheckedReward("mine", function, "skip")(**call) == [1.0, None]


def test_a_reward_must_return_one_number_a_completion():
    with pytest.raises(RewardError, match="returned 1 values for 2"):
        CheckedReward("one", lambda completions: [1.0])(turns("p") * 2, turns("c") * 2)
    with pytest.raises(RewardError, match="returned 'x'"):
        CheckedReward("text", lambda completions: ["x"])(turns("p"), turns("c"))
