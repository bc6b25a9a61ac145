"""Clients of other people run unchanged, each in its own environment."""

import subprocess
import sys

import pytest

pytestmark = [pytest.mark.clients, pytest.mark.slow]
CLIENTS = {
    "openai": "openai_client.py",
    "litellm": "litellm_client.py",
    "langchain": "langchain_client.py",
    "instructor": "instructor_client.py",
    "pydantic-ai": "pydantic_ai_client.py",
    "npm": "openai_client.mjs",
    "npm-ai": "ai_sdk_client.mjs",
}


@pytest.mark.parametrize("client", CLIENTS)
def test_a_client_runs_unchanged(run_client, client):
    said = run_client(client.removesuffix("-ai") if client == "npm-ai" else client, CLIENTS[client])
    assert said.rstrip().endswith("ok")


def test_guidellm_has_no_failed_request(run_client, model):
    said = run_client("guidellm", "guidellm_client.py", str(model))
    assert said.rstrip().endswith("ok")


def test_lm_eval_scores_as_on_the_model_itself(run_client, model, adapter, tmp_path):
    """For the base model, and for an adapter beside the same adapter merged into the base."""
    merged = tmp_path / "merged"
    command = [sys.executable, "-m", "veratune.cli.main", "merge", "--model", str(model)]
    command += ["--adapter", str(adapter), "--out", str(merged)]
    subprocess.run(command, check=True, capture_output=True)
    said = run_client("lm-eval", "lm_eval_client.py", str(model), str(merged))
    print(said)
    assert said.rstrip().endswith("ok")
