import json

import pytest
import transformers as hf

from veratune.analysis.explain import explain
from veratune.cli.main import main
from veratune.config import PLANS, VeraConfig
from veratune.errors import UnsupportedError


@pytest.fixture
def roberta(tmp_path):
    hf.RobertaConfig(vocab_size=1000).to_json_file(tmp_path / "config.json", use_diff=False)
    return str(tmp_path / "config.json")


def test_the_plan_that_is_taken_is_the_cheapest(roberta):
    (line,) = explain(roberta, VeraConfig(rank=1024, targets=("query", "value")), tokens=2048)
    assert line.layers == ["query", "value"] * 12
    assert (line.tokens, line.in_features, line.out_features, line.rank) == (2048, 768, 768, 1024)
    assert line.seconds[line.plan] == min(line.seconds.values())
    assert set(line.seconds) == set(PLANS)
    (forced,) = explain(roberta, VeraConfig(rank=8, targets=("query",), plan="dense"), tokens=8)
    assert forced.plan == "dense"


def test_each_size_and_rank_has_a_line(tmp_path):
    hf.LlamaConfig(
        vocab_size=1000, hidden_size=1024, intermediate_size=2816, num_hidden_layers=2
    ).to_json_file(tmp_path / "config.json", use_diff=False)
    config = VeraConfig(rank=256, targets="all-linear", rank_pattern={"re:.*down_proj": 64})
    lines = explain(str(tmp_path / "config.json"), config, tokens=2048)
    assert [line.rank for line in lines].count(64) == 1
    assert len(lines) == 3


def test_a_convolution_is_refused(tmp_path):
    config = hf.ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], layer_type="basic")
    config.to_json_file(tmp_path / "config.json", use_diff=False)
    with pytest.raises(UnsupportedError, match="is a Conv2d, whose cost depends on the size"):
        explain(str(tmp_path / "config.json"), VeraConfig(rank=4, targets="all-conv"), tokens=8)


def test_the_command(roberta, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    words = ["explain", "--model", roberta, "--rank", "1024", "--targets", "query,value"]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "12 query, 12 value" in out
    assert "merged" in out
    assert main([*words, "--json"]) == 0
    (line,) = json.loads(capsys.readouterr().out)
    assert line["tokens"] == 16 * 128
