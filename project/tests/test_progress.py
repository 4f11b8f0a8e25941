"""What a person sees: names that hold anything, and streams that nobody reads any more."""

import csv
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cwdm import runner
from cwdm.cli.app import app
from cwdm.cli.outcomes import sum_up
from cwdm.errors import CaseError, SettingsError
from cwdm.evaluation import Score
from cwdm.evaluation.tables import write_evaluation
from cwdm.inference.outcome import Outcome
from cwdm.progress import CohortProgress, make_logs_printable, print_error, print_line, print_notice

FORGED = "error: all is well"
NAME = f"P-1\n{FORGED}\r\x1b[2J\u202e\udc80"
SHOWN = rf"P-1\n{FORGED}\r\x1b[2J\u202e\udc80"

ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[1])}


@pytest.fixture
def closed() -> Iterator[int]:
    """A pipe whose reader has gone."""
    reader, writer = os.pipe()
    os.close(reader)
    yield writer
    os.close(writer)


def cwdm(*words: str, **streams: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "cwdm", *words]
    kept = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **streams}
    return subprocess.run(command, text=True, env=ENVIRONMENT, check=False, **kept)  # type: ignore[call-overload]


def test_exit_codes_tell_the_truth_whoever_listens(closed: int, tmp_path: Path) -> None:
    failing = ("drop", str(tmp_path / "none"), str(tmp_path / "out"))
    with open("/dev/full", "w") as full:  # noqa: PTH123
        assert cwdm(*failing, stderr=closed).returncode == 2
        assert cwdm(*failing, stderr=full).returncode == 2
        assert cwdm("--version", stdout=closed).returncode == 0
        said = cwdm("--version", stdout=full)
    assert said.returncode == 2
    assert "cannot write to standard output: No space left on device" in said.stderr


def test_files_do_not_take_the_place_of_closed_streams(tmp_path: Path) -> None:
    code = """
import os, sys
from pathlib import Path
import cwdm.cli.app as module
def app():
    with Path(sys.argv[1]).open("w"):
        os.write(2, b"what a library says")
module.app = app
module.main()
"""
    command = 'exec "$0" -c "$1" "$2" 2>&-'
    done = subprocess.run(
        ["sh", "-c", command, sys.executable, code, str(tmp_path / "file")], env=ENVIRONMENT, check=False
    )
    assert done.returncode == 0
    assert not (tmp_path / "file").read_text()


def test_a_run_that_nobody_listens_to_goes_on(closed: int) -> None:
    code = """
import sys
from cwdm.progress import CohortProgress, print_notice, print_table
from rich.table import Table
with CohortProgress(100) as progress:
    for number in range(100):
        progress.end_case(f"case {number}")
print_notice("the end")
print_table(Table("a"))
sys.exit(7)
"""
    for streams in ({"stderr": closed}, {"stdout": closed, "stderr": closed}):
        done = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, check=False, **streams)
        assert done.returncode == 7


def test_no_name_starts_a_line_of_its_own(capfd: pytest.CaptureFixture[str]) -> None:
    progress = CohortProgress(1)
    for outcome in (runner.Outcome(NAME, "written", warnings=(NAME,)), runner.Outcome(NAME, "failed", NAME)):
        progress.end_case(outcome.line)
        sum_up([outcome], NAME, progress.log)
    for made in (Outcome(NAME, "t1n", "written", warnings=(NAME,)), Outcome(NAME, "t1n", "failed", NAME)):
        progress.end_case(made.line)
    for score in (Score(NAME, "t1n", {"psnr": 1.0, "ssim": 1.0}, notes=(NAME,)), Score(NAME, "t1n", reason=NAME)):
        progress.end_case(score.line)
    for line in (NAME, CaseError(NAME, NAME)):
        progress.log(str(line))
        print_notice(line)
        print_error(line)
        print_line(line)
    captured = capfd.readouterr()
    lines = (captured.out + captured.err).splitlines()
    assert len(lines) == 20
    for line in lines:
        assert SHOWN in line or "all is well" not in line
        assert not line.startswith(FORGED)
        assert line.isprintable()


def test_errors_of_several_lines_have_as_many(capfd: pytest.CaptureFixture[str]) -> None:
    error = SettingsError("one", NAME)
    assert str(error) == f"one\n{NAME}"
    print_error(*error.args)
    assert capfd.readouterr().err.splitlines() == ["error: one", SHOWN]


def test_no_name_starts_a_line_of_the_log(capfd: pytest.CaptureFixture[str]) -> None:
    make_logs_printable()
    assert logging.lastResort
    record = logging.LogRecord("cwdm", logging.WARNING, __file__, 1, "passed over: %s", (NAME,), None)
    assert logging.lastResort.format(record) == f"passed over: {SHOWN}"


def test_a_line_of_the_table_is_an_image(tmp_path: Path) -> None:
    write_evaluation(tmp_path, [Score(NAME, "t1n", {"psnr": 1.0}, notes=(NAME,)), Score("P-2", "t1n", reason=NAME)], {})
    lines = (tmp_path / "evaluation.csv").read_text().splitlines()
    assert len(lines) == 3
    first, second = csv.DictReader(lines)
    assert (first["case"], first["notes"], second["reason"]) == (SHOWN, SHOWN, SHOWN)


def test_a_case_with_such_a_name_is_one_line_of_a_run(cohort: Path, tmp_path: Path) -> None:
    bad = next(cohort.iterdir())
    bad.rename(cohort / NAME)
    done = CliRunner().invoke(
        app, ["complete", str(cohort), str(tmp_path / "out"), "--synthesised", str(cohort / "none")]
    )
    assert done.exit_code == 1
    assert f"{SHOWN} FAILED" in done.stderr
    assert FORGED not in done.stderr.splitlines()
