"""The load generator: what it asks, what it measures, and a server that it is let loose on."""

import asyncio
import json

import numpy as np
import pytest

import veratune as vt
from tests import fakes
from tests.serving.fakes import small_llama
from tests.serving.http.fakes import FILES, RunningServer
from veratune.errors import ConfigError
from veratune_lab.__main__ import main
from veratune_lab.bench.load import Load, OpenLoad
from veratune_lab.bench.serve import Answered, measure, open_loop, percentiles

SMALL = Load(prompt=4, answer=3, rows=3, rounds=2, rate=200, requests=20, population=8, resident=12)


def test_all_lines_of_a_tiny_model():
    lines = measure(
        small_llama().eval(),
        fakes.tokenizer(),
        vt.VeraConfig(rank=6, targets=("query", "value")),
        SMALL,
        lambda text: None,
    )
    by = {line.get("workload", line["what"]): line for line in lines}
    assert list(by) == [
        "adapters in memory", "base alone", "one tenant", "3 tenants", "one after the other", "PEFT LoRA r=16, mixed batch", "equal to alone", "conversation",
        "cold start", "open load",
    ]  # fmt: skip
    assert by["adapters in memory"]["adapters"] == 12
    assert by["one tenant"]["of_one_tenant"] == 1
    assert all(
        len(line["turns"]) == 2 and min(line["turns"]) > 0
        for line in lines
        if line["what"] == "closed load"
    )
    assert (by["equal to alone"]["equal"], by["equal to alone"]["rows"]) == (3, 3)
    talk = by["conversation"]
    assert (
        len(talk["first_token_kept_ms"])
        == len(talk["first_token_read_again_ms"])
        == talk["turns"]
        > 1
    )
    assert talk["equal"] == talk["answers"] == 3 * talk["turns"]
    assert by["open load"]["failed"] == 0
    assert by["open load"]["hits"] + by["open load"]["loads"] == 20
    assert {line["rank"] for line in lines} == {6}


def test_the_open_load_comes_at_its_rate_and_by_zipfs_law():
    asked, clock = [], []

    async def send(tenant):
        asked.append(tenant)
        clock.append(asyncio.get_running_loop().time())
        if tenant == 0 and len(asked) == 1:
            raise ValueError("refused")
        await asyncio.sleep(0)
        return Answered(0.1, [0.01, 0.03])

    load = OpenLoad(rate=2000, requests=400, zipf=1.5)
    line = asyncio.run(open_loop(send, load, 50, lambda text: None))
    shares = np.bincount(asked, minlength=50) / len(asked)
    assert 0.3 < shares[0] < 0.55  # 1 / sum of k^-1.5 is 0.43
    assert shares[0] > shares[1] > shares[10]
    assert 0.1 < clock[-1] - clock[0] < 2.0  # 0.2 s
    assert line["failed"] + len(asked) >= 400
    assert line["first_token"] == {"p50_ms": 100.0, "p90_ms": 100.0, "p99_ms": 100.0}
    assert line["each_token"]["p50_ms"] == 20.0
    assert percentiles([]) == {}
    with pytest.raises(ConfigError, match="rate is 0"):
        OpenLoad(rate=0)
    with pytest.raises(ConfigError, match="population is 1"):
        Load(population=1)


def test_a_server_under_load(tmp_path, capsys):
    served = RunningServer(tmp_path, open=True)
    try:
        with served.http() as http:
            for name in ("alice", "bob"):
                http.put(f"/v1/adapters/{name}", content=FILES[name])
        out = tmp_path / "lines.jsonl"
        words = [
            "bench",
            "load",
            "--url",
            served.url,
            "--rate",
            "50",
            "--requests",
            "12",
            "--answer",
            "8",
            "--prompt",
            "3",
        ]
        assert main([*words, "--out", str(out)]) == 0
        line = json.loads(out.read_text())
        assert (line["population"], line["failed"]) == (3, 0), line["errors"]
        assert "open load" in capsys.readouterr().out
        assert served.engine.stats.finished["length"] + served.engine.stats.finished["stop"] == 12
        served.engine.eos_token_ids = set(
            range(300)
        )  # every answer is empty, and an answer all the same
        assert main([*words, "--out", str(out)]) == 0
        last = json.loads(out.read_text().splitlines()[-1])
        assert (last["failed"], last["each_token"], served.engine.stats.finished["stop"] >= 12) == (
            0,
            {},
            True,
        )
    finally:
        served.stop()
    assert main(words) == 1
    assert "its models cannot be listed" in capsys.readouterr().err
    assert main([*words, "--key", "NO_SUCH_KEY"]) == 2
    assert "NO_SUCH_KEY, which is not set" in capsys.readouterr().err
    assert main([*words, "--rank", "3"]) == 2  # a form has its own flags alone
    assert main(["bench", "serve"]) == 2
    assert main(["bench", "sever"]) == 2
    assert "did you mean 'serve'" in capsys.readouterr().err
    assert main(["bench", "layers", "--rank", "3"]) == 2
