import pytest
import torch

from veratune.basis import directions
from veratune.basis.direction_cache import DirectionCache, default_folder
from veratune.basis.directions import LayerDirections

CPU = torch.device("cpu")


@pytest.fixture
def counted(monkeypatch):
    """Every weight counts as large; the list holds one entry a computation."""
    calls, real = [], directions.principal_directions
    monkeypatch.setattr(directions, "SMALLEST", 1)
    monkeypatch.setattr(
        directions, "principal_directions", lambda *args: calls.append(args) or real(*args)
    )
    return calls


def pair(weight, cache, rank=3, seed=0):
    return LayerDirections("x", lambda: weight, rank, seed, cache).pair(CPU, torch.float32)


def weight_of(seed=0):
    return torch.randn(9, 7, generator=torch.Generator().manual_seed(seed))


def test_directions_are_computed_once_for_a_weight_a_rank_and_a_seed(tmp_path, counted):
    cache = DirectionCache(tmp_path)
    first, again = pair(weight_of(), cache), pair(weight_of(), cache)
    assert len(counted) == 1
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    pair(weight_of(1), cache)
    pair(weight_of(), cache, rank=2)
    pair(weight_of(), cache, seed=1)
    pair(weight_of().double(), cache)
    assert len(counted) == 5


@pytest.mark.parametrize("damage", ["cut", "empty", "long", "other"])
def test_a_damaged_file_is_computed_again(tmp_path, counted, damage):
    cache = DirectionCache(tmp_path)
    wanted = pair(weight_of(), cache)
    (file,) = tmp_path.iterdir()
    data = file.read_bytes()
    file.write_bytes(
        {"cut": data[:-8], "empty": b"", "long": data + bytes(5000), "other": b"x" * len(data)}[
            damage
        ]
    )
    found = pair(weight_of(), cache)
    assert len(counted) == 2
    assert all(torch.equal(a, b) for a, b in zip(wanted, found, strict=True))
    assert file.read_bytes() == data
    assert list(tmp_path.iterdir()) == [file]


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path, counted):
    (tmp_path / "file").write_text("in the way")
    pair(weight_of(), DirectionCache(tmp_path / "file"))
    assert len(counted) == 1


def test_the_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("VERATUNE_CACHE", str(tmp_path))
    assert default_folder() == tmp_path / "principal"
    monkeypatch.delenv("VERATUNE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert default_folder() == tmp_path / "xdg" / "veratune" / "principal"


def test_the_oldest_files_make_room(tmp_path, counted):
    size = 4 * 3 * (9 + 7) + 200
    cache = DirectionCache(tmp_path, max_bytes=2 * size)
    for seed in range(4):
        pair(weight_of(seed), cache)
    assert len(list(tmp_path.iterdir())) == 2
    pair(weight_of(3), cache)
    assert len(counted) == 4
    pair(weight_of(0), cache)
    assert len(counted) == 5
