"""Scores of a report's cases: all of them, the same as those of `cwdm evaluate`, and which are poor."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
from support import spoil
from typer.testing import CliRunner

from cwdm.cli.app import app
from cwdm.errors import InputError
from cwdm.evaluation import Score
from cwdm.images.cases import output_name
from cwdm.report import ReportPaths, write_report
from cwdm.report.data import read_records
from cwdm.report.scores import PSNR, SSIM, find_poor, read_scores, score_entries

from .report_cases import MODALITY, add_case, mirror

SOURCE = "BraTS-PHANTOM-00000-000"


@pytest.fixture
def cohort(phantoms: Path, tmp_path: Path) -> ReportPaths:
    """Four cases of which the last one by name is far worse than the others, and has been let pass."""
    for name, noise in {"a": 0.02, "b": 0.02, "c": 0.021, "d": 0.06}.items():
        paths = add_case(tmp_path, phantoms / SOURCE, name, noise)
    return paths


def scores_of(values: dict[str, float], modality: str = "t1n") -> dict[tuple[str, str], Score]:
    return {(case, modality): Score(case, modality, {PSNR: value}) for case, value in values.items()}


def test_every_case_is_scored_and_the_worst_is_on_top_and_pictured(cohort: ReportPaths, tmp_path: Path) -> None:
    text = write_report(cohort, most=1, path=tmp_path / "page.html").read_text()
    assert "1 of 4 cases should be looked at" in text
    rows = text[text.index("<tbody>") : text.index("</tbody>")].split("<tr")[1:]
    assert 'data-verdict="look"' in rows[0]
    assert "<bdi>d</bdi>" in rows[0]
    assert "where half of the t1n have" in rows[0]
    assert all('data-label="SSIM" data-value="0.' in row for row in rows)
    assert text.count('<section class="case"') == 1


def test_of_those_that_are_marked_none_is_left_out(phantoms: Path, tmp_path: Path) -> None:
    for name, verdict in {"a": "look", "b": "reject", "c": "look", "d": "ok", "e": "ok"}.items():
        paths = add_case(tmp_path, phantoms / SOURCE, name, verdict=verdict)
    text = write_report(paths, most=1).read_text()
    assert text.count('<section class="case"') == 3
    assert "3 of 5 cases should be looked at" in text
    assert write_report(paths, most=4).read_text().count('<section class="case"') == 4


def test_the_numbers_are_those_of_evaluate(cohort: ReportPaths, tmp_path: Path) -> None:
    mirror(tmp_path / "output" / output_name("b", MODALITY), 1)
    entries = read_records(cohort.report).entries
    own = score_entries(entries, cohort)
    arguments = ["evaluate", str(tmp_path / "output"), str(tmp_path / "truth"), "--out", str(tmp_path / "scores")]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    read = read_scores(tmp_path / "scores", entries, cohort)
    assert own.keys() == read.keys() == {(name, MODALITY) for name in "abcd"}
    for key, score in own.items():
        assert {name: score.metrics[name] for name in (PSNR, SSIM)} == {
            name: read[key].metrics[name] for name in (PSNR, SSIM)
        }


def test_scores_that_evaluate_wrote_are_taken(cohort: ReportPaths, tmp_path: Path) -> None:
    arguments = ["evaluate", str(tmp_path / "output"), str(tmp_path / "truth"), "--out", str(tmp_path / "scores")]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    image = tmp_path / "output" / output_name("c", MODALITY)
    later = (tmp_path / "scores" / "evaluation.json").stat().st_mtime + 10
    os.utime(image, (later, later))
    options = ["--scores", str(tmp_path / "scores"), "--out", str(tmp_path / "page.html")]
    result = CliRunner().invoke(app, ["report", str(cohort.report), *options])
    assert result.exit_code == 0, result.output
    text = (tmp_path / "page.html").read_text()
    assert "1 of 4 cases should be looked at" in text
    assert text.count('data-label="SSIM" data-value="0.') == 3
    assert "its image was written after it was scored" in text


def test_no_scores_is_one_clear_message(cohort: ReportPaths, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"evaluation\.json cannot be read.*cwdm evaluate --out"):
        write_report(replace(cohort, scores=tmp_path))
    spoil(tmp_path / "evaluation.json", "pipe")
    with pytest.raises(InputError, match="is not a regular file"):
        write_report(replace(cohort, scores=tmp_path))
    spoil(tmp_path / "evaluation.json", "deep")
    with pytest.raises(InputError, match="is not an evaluation"):
        write_report(replace(cohort, scores=tmp_path))
    (tmp_path / "evaluation.json").write_text('{"images": 3}')
    with pytest.raises(InputError, match="is not an evaluation"):
        write_report(replace(cohort, scores=tmp_path))
    (tmp_path / "evaluation.json").write_text('{"images": [{"case": "z", "modality": "t1n"}]}')
    with pytest.raises(InputError, match="scores none of the images"):
        write_report(replace(cohort, scores=tmp_path))


def test_a_case_that_cannot_be_scored_says_why(cohort: ReportPaths, tmp_path: Path) -> None:
    (tmp_path / "truth" / "b" / output_name("b", MODALITY)).unlink()
    (tmp_path / "output" / output_name("c", MODALITY)).unlink()
    text = write_report(cohort).read_text()
    assert "not scored: its true image is not in" in text
    assert "not scored: its output is not at" in text


def test_poor_is_what_falls_behind_its_like_or_shows_nothing() -> None:
    assert find_poor(scores_of({"a": 12.7, "b": 21, "c": 21.3})).keys() == {("a", "t1n")}
    assert "21.0 or more" in find_poor(scores_of({"a": 16, "b": 21, "c": 21.3}))[("a", "t1n")]
    assert not find_poor(scores_of({"a": 18.5, "b": 21, "c": 21.3}))  # less than twice the squared error
    assert not find_poor(scores_of({"a": 16, "b": 18, "c": 20, "d": 22, "e": 24}))  # all differ as much
    assert find_poor(scores_of({"a": 14.9})).keys() == {("a", "t1n")}
    assert not find_poor(scores_of({"a": float("inf"), "b": float("inf"), "c": 30}))
    assert not find_poor(scores_of({"a": 25, "b": 25.1, "c": 25.2}) | scores_of({"a": 20, "b": 20.1}, "t2f"))
    assert not find_poor({("a", "t1n"): Score("a", "t1n", reason="no")})
