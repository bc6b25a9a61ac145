import json

import pytest

from veratune.errors import ConfigError, DataError
from veratune_lab.paper.experiment import Cell, Experiment, Place, reproduce, spread, table
from veratune_lab.paper.registry import EXPERIMENTS, experiment

RUN = []


class Small(Experiment):
    name, about = "small", "two cells"

    def cells(self, scale):
        def run(name, place, seed, folder):
            RUN.append((name, seed))
            if name == "b" and len(RUN) == 2:
                raise KeyboardInterrupt
            return {"score": seed + 1.0}

        return [
            Cell(name=name, shown={"kind": name}, run=lambda *a, name=name: run(name, *a))
            for name in "ab"
        ]

    def page(self, lines, scale):
        return table(["cell", "score"], [[line["cell"], line["score"]] for line in lines])


def test_it_goes_on_where_it_was_cut_off(tmp_path):
    RUN.clear()
    place = Place(out=tmp_path / "small")
    with pytest.raises(KeyboardInterrupt):
        reproduce(Small(), place, seeds=2)
    said = []
    lines = reproduce(Small(), place, seeds=2, show=said.append)
    assert RUN == [("a", 0), ("b", 0), ("b", 0), ("a", 1), ("b", 1)]  # a, seed 0 was not run again
    assert [line["score"] for line in lines] == [1.0, 1.0, 2.0, 2.0]
    assert said[0] == "small 2/4: b, seed 0"
    assert [
        json.loads(text)["cell"]
        for text in (tmp_path / "small" / "results.jsonl").read_text().splitlines()
    ] == [
        "a",
        "b",
        "a",
        "b",
    ]
    assert "| b | 2.0 |" in (tmp_path / "small" / "README.md").read_text()
    assert reproduce(Small(), place, seeds=2) == lines
    assert len(RUN) == 5
    assert [line["scale"] for line in reproduce(Small(), place, "quick", only="a")] == ["quick"]


def test_mistakes(tmp_path):
    with pytest.raises(
        ConfigError, match="unknown experiment 'conv-minst'; there are .*did you mean 'conv-mnist'"
    ):
        experiment("conv-minst")
    with pytest.raises(ConfigError, match="--only 'z' is in no cell's name; small has a, b"):
        reproduce(Small(), Place(out=tmp_path), only="z")
    with pytest.raises(DataError, match="mnist is wanted: give --data FOLDER"):
        Place(out=tmp_path).dataset("mnist")
    with pytest.raises(DataError, match="no folder mnist/ in it"):
        Place(out=tmp_path, data=tmp_path).dataset("mnist")


def test_means_and_spreads():
    assert spread([{"x": 1.0}], lambda line: line["x"]) == "1.0"
    assert spread([{"x": 1.0}, {"x": 3.0}], lambda line: line["x"]) == "2.0 ± 1.4"
    assert spread([], lambda line: 0.0) == "not run"


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_says_what_it_is_at_every_scale(name):
    found = experiment(name)
    for scale in ("quick", "scaled", "full"):
        cells = found.cells(scale)
        assert len({cell.name for cell in cells}) == len(cells) > 0
        assert found.about in found.page([], scale)
        assert found.seeds[scale] >= 1
