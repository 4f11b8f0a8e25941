"""Summaries and tables of scores."""

import io
import statistics

import pytest
from rich.console import Console

from cwdm.evaluation.score import Score
from cwdm.evaluation.tables import summaries, summarise, tables


def test_a_region_that_nobody_has_has_no_rows() -> None:
    def shown(cavities: int) -> str:
        metrics = {"dice_et": 0.5, "lesions_true_et": 2, "dice_rc": 1.0, "lesions_true_rc": 0, "lesions_added_rc": 0}
        scores = [Score(name, "t1n", {**metrics, "lesions_true_rc": cavities}) for name in "ab"]
        console = Console(file=io.StringIO(), width=120)
        for table in tables(scores):
            console.print(table)
        return console.file.getvalue()

    assert "Dice, resection cavity" not in shown(0)
    assert "No resection cavity in any segmentation" in shown(0)
    assert "Dice, enhancing tumour" in shown(0)
    assert "Dice, resection cavity" in shown(1)


def test_summary_by_hand() -> None:
    values = {"a": (20.0, 0.3), "b": (10.0, 0.1), "c": (40.0, 0.2)}
    scores = [Score(case, "t1n", {"psnr": psnr, "mse": mse}) for case, (psnr, mse) in values.items()]
    summary = summarise([*scores, Score("bad", "t1n", reason="damaged")])
    assert summary["psnr"] == {
        "images": 3,
        "mean": pytest.approx(70 / 3),
        "sd": pytest.approx(statistics.stdev([20, 10, 40])),
        "median": 20.0,
        "worst": 10.0,
        "worst_case": "b-t1n",
    }
    assert (summary["mse"]["worst"], summary["mse"]["worst_case"]) == (0.3, "a-t1n")
    equal = summarise([*scores, Score("d", "t2w", {"psnr": float("inf")})])["psnr"]
    assert (equal["mean"], equal["sd"], equal["median"]) == (float("inf"), None, 30.0)
    assert list(summaries([*scores, Score("d", "t2w", {"psnr": 1.0})])) == ["all", "t1n", "t2w"]
