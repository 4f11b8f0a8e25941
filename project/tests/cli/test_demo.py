from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from cwdm.cli.demo import run_demo
from cwdm.errors import InputError
from cwdm.report import Comparison, draw_comparisons


def test_picture_shows_a_row_a_case_and_the_images_in_it(tmp_path: Path) -> None:
    random = np.random.RandomState(0)
    truth = np.zeros((40, 48, 33), np.float32)
    truth[10:30, 8:40, 5:28] = random.random_sample((20, 32, 23))
    rows = [
        Comparison(f"case-{i}", {"t1n": truth, "t1c": truth, "t2w": truth}, "t2f", 0 * truth, truth, "PSNR", 16)
        for i in range(2)
    ]
    draw_comparisons(tmp_path / "one.png", rows[:1], "title")
    draw_comparisons(tmp_path / "two.png", rows, "title")
    one, two = (matplotlib.image.imread(tmp_path / name) for name in ("one.png", "two.png"))
    assert two.shape[0] > 1.5 * one.shape[0]
    bright = (one[..., :3] > 0.3).all(axis=2)
    columns = bright.reshape(bright.shape[0], 6, -1).mean(axis=(0, 2))
    # Three conditions and the truth show the image; the synthesis is black but for its labels.
    assert columns[[0, 1, 2, 4]].min() > 3 * columns[3]


def test_no_demo_beside_real_patients(tmp_path: Path) -> None:
    (tmp_path / "patients" / "BraTS-GLI-00001-000").mkdir(parents=True)
    with pytest.raises(InputError, match="holds BraTS-GLI-00001-000, which is no synthetic patient"):
        run_demo(tmp_path, 1, Path("bundled"))
    assert [path.name for path in tmp_path.iterdir()] == ["patients"]


def test_an_empty_slice_is_drawn_too(tmp_path: Path) -> None:
    empty = np.zeros((8, 8, 8), np.float32)
    row = Comparison("case", {"t1n": empty, "t1c": empty, "t2w": empty}, "t2f", empty, empty, "", 4)
    draw_comparisons(tmp_path / "empty.png", [row], "title")
    assert (tmp_path / "empty.png").stat().st_size > 0
