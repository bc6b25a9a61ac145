import numpy as np
from PIL import Image

from veratune.analysis.pictures import draw_against, draw_confusion, draw_grid, with_boxes


def read(path):
    with Image.open(path) as picture:
        return np.asarray(picture)


def test_a_grid_has_every_image_in_its_place(tmp_path):
    red, blue = Image.new("RGB", (4, 4), "red"), Image.new("RGB", (4, 4), "blue")
    pixels = read(draw_grid({"": [red, blue], " ": [blue]}, tmp_path / "deep" / "grid.png", zoom=2))
    assert (pixels[:8] == (255, 0, 0)).all(-1).sum() == 64
    assert (pixels == (0, 0, 255)).all(-1).sum() == 128
    assert (pixels[10:18] == (0, 0, 255)).all(-1).sum() == 64


def test_boxes_are_drawn_where_they_are():
    drawn = np.asarray(
        with_boxes(Image.new("RGB", (60, 40), "white"), [[10, 5, 50, 35]], [0], ["a"], [0.5])
    )
    assert (drawn[20, 10] != 255).any()
    assert (drawn[20, 50] != 255).any()
    assert (drawn[30, 30] == 255).all()


def test_charts_are_written(tmp_path):
    for labels in (["a", "b"], [str(i) for i in range(30)]):
        path = draw_confusion(
            np.eye(len(labels), dtype=int) * 3, labels, tmp_path / f"{len(labels)}.png"
        )
        assert read(path).shape[1] > 300
    path = draw_against(
        {"x": [(10, 1.0, "a"), (1000, 2.0, "b")]}, tmp_path / "a.png", "values", "accuracy"
    )
    assert read(path).shape[1] > 300
