import json

import pytest
import torch
import transformers as hf
from torch import nn

from tests import fakes
from veratune.analysis.timing import interleave
from veratune.errors import ConfigError
from veratune.ops import plans
from veratune_lab.__main__ import main
from veratune_lab.bench import steps
from veratune_lab.bench.layers import grid
from veratune_lab.bench.measure import Timing, flops, peak_bytes, saved_bytes, summary
from veratune_lab.bench.peers import FROZEN, OURS, Peer, adapted

pytestmark = [
    pytest.mark.filterwarnings("ignore:Specified to not save vera_A:UserWarning"),
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
]


def tiny(layers):
    config = hf.RobertaConfig(
        vocab_size=50, hidden_size=16, num_attention_heads=2, intermediate_size=24, num_hidden_layers=layers,
        max_position_embeddings=40, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return hf.RobertaForSequenceClassification(config)


@pytest.fixture
def small(monkeypatch):
    shape = steps.Shape(tiny, 3, 2, (2, 8), 16, 8, ("query", "value"), "a tiny RoBERTa")
    monkeypatch.setattr(steps, "_roberta", tiny)
    monkeypatch.setitem(steps.SHAPES, "tiny", shape)


def test_arithmetic_and_memory_of_a_linear_layer_are_the_known_ones():
    model = nn.Sequential(nn.Linear(8, 6, bias=False)).requires_grad_(False)
    x = torch.randn(10, 8, requires_grad=True)

    def step():
        model(x.detach().requires_grad_()).sum().backward()

    assert flops(step) == 2 * (2 * 10 * 8 * 6)
    assert saved_bytes(lambda: model(x), model) == 0
    model.requires_grad_(True)
    assert saved_bytes(lambda: model(x), model) == 4 * 10 * 8
    assert flops(step) == 3 * (2 * 10 * 8 * 6)
    assert peak_bytes(lambda: torch.ones(1000, 1000).sum()) >= 4_000_000


def test_vera_counts_what_its_plan_says():
    T, n, m, r = 16, 12, 8, 4
    base, x = nn.Sequential(nn.Linear(n, m)), torch.randn(16, 12)
    beyond = {"merged": T * m * n + 2 * m * n * r, "projected": m * n * r + T * r * (n + m)}
    for plan, wanted in beyond.items():
        model = adapted(base, Peer(OURS, r, plan), ["0"])

        def step(model=model):
            model(x.detach().requires_grad_()).sum().backward()

        vectors = 4 * m * r  # bᵀ (B ∘ P) and (B ∘ P) d
        assert 2 * wanted <= flops(step) - 4 * T * m * n <= 2 * wanted + vectors


def test_steps_take_turns_and_ratios_are_of_the_same_turn():
    order = []
    times = interleave(
        {name: (lambda name=name: order.append(name)) for name in "ab"}, seconds=0.0, least=5
    )
    assert {len(found) for found in times.values()} == {5}
    assert order.index("b") < len(order) - order[::-1].index("a")
    line = summary([2.0, 4.0, 6.0], [1.0, 1.0, 2.0])
    assert (line["seconds"], line["over_frozen"], line["turns"]) == (4.0, 3.0, 3)


def test_the_grid_has_a_line_for_each_contestant():
    lines = list(grid([8], [(8, 6)], [2, 4], plans=True, timing=Timing(0, "cpu", "a test")))
    assert len(lines) == 4 + 2 * (2 + len(plans.PLANS))
    assert all(
        line["seconds"] > 0 and line["machine"] and line["torch"] == torch.__version__
        for line in lines
    )
    ours = [line for line in lines if line["method"] == OURS]
    assert all(line["chosen"] == line["plan"] or line["plan"] == "auto" for line in ours)
    assert {(line["clock"], line["beside"]) for line in lines} == {("CPU seconds", "a test")}
    blocks = list(grid([8], [(8, 6)], [4], basis="monarch", timing=Timing(0)))
    assert [(line["method"], line["basis"]) for line in blocks] == [
        (FROZEN, "random"),
        ("lora", "random"),
        (OURS, "monarch"),
    ]
    full = next(line for line in lines if line["method"] == "full")
    assert full["flops_over_frozen"] == 1.5


def test_a_step_of_a_whole_model(small):
    told = []
    lines = steps.step("tiny", layers=2, timing=Timing(0), log=told.append)
    assert [line["method"] for line in lines] == [FROZEN, "full", "lora", "lora", "peft-vera", OURS]
    assert lines[-1]["trained"] == 2 * 2 * (8 + 16) == lines[-2]["trained"]
    assert all(line["layers"] == 2 and line["peak_bytes"] > 0 for line in lines)
    assert lines[0]["flops_beyond_frozen"] == 0 < lines[-1]["flops_beyond_frozen"]
    assert any("2 of 3 layers" in text for text in told)


def test_unknown_names_are_refused():
    with pytest.raises(
        ConfigError, match="no benchmark model 'roberta'; there are .* did you mean 'roberta-base'"
    ):
        steps.shape_of("roberta")
    with pytest.raises(ConfigError, match="no contestant 'lora2'; did you mean 'lora'"):
        adapted(fakes.perceptron(), Peer("lora2"), ["0"])


def test_commands(small, tmp_path, capsys):
    out = tmp_path / "lines.jsonl"
    words = [
        "bench",
        "step",
        "--model",
        "tiny",
        "--seconds",
        "0",
        "--json",
        "--threads",
        str(torch.get_num_threads()),
    ]
    assert main([*words, "--basis", "monarch", "--out", str(out)]) == 0
    lines = json.loads(capsys.readouterr().out)
    assert lines == [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["basis"] for line in lines[-2:]] == ["random", "monarch"]
    assert main(words[:-3]) == 0
    assert "a tiny RoBERTa: 2 of 3 layers" in capsys.readouterr().out
    assert main(["bench", "--model", "x"]) == 2
    assert "no benchmark model 'x'" in capsys.readouterr().err
    assert main(["bench", "--threads", "0"]) == 2
