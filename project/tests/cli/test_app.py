"""The command line as a whole: its help, its exit codes, and what it loads."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from cwdm.cli import app as module
from cwdm.cli.app import PANELS, app, said
from cwdm.errors import SettingsError
from cwdm.images import MODALITIES

MOST_LINES_OF_THE_COMMAND_LINE_FOR_INFER = 370


def commands() -> dict[str, Any]:
    """Every command by its words."""
    root: Any = typer.main.get_command(app)
    context = root.make_context("cwdm", ["infer"], resilient_parsing=True)
    found = {}
    for name in root.list_commands(context):
        command = root.get_command(context, name)
        found |= {f"{name} {inner}": one for inner, one in getattr(command, "commands", {}).items()} or {name: command}
    return found


COMMANDS = commands()


def process(*words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "COLUMNS": "80"}
    command = [sys.executable, "-m", "cwdm", *words]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


@pytest.mark.parametrize("columns", [80, 120])
def test_commands_stand_in_panels(columns: int) -> None:
    told = CliRunner().invoke(app, ["--help"], env={"COLUMNS": str(columns)}, terminal_width=columns).output
    places = [told.index(f"─ {panel} ─") for panel in PANELS]
    assert places == sorted(places)
    ends = [*places[1:], len(told)]
    for names, start, end in zip(PANELS.values(), places, ends, strict=True):
        shown = [line.split()[1] for line in told[start:end].splitlines() if line.startswith("│ ") and line[2] != " "]
        assert shown == list(names)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_is_whole_sentences(name: str) -> None:
    """A line ends where a sentence does, since each is broken where the terminal ends."""
    assert all(line.endswith((".", ":")) for line in COMMANDS[name].help.splitlines() if line)
    for param in COMMANDS[name].params:
        if not param.hidden and param.name != "help":
            text = param.help.replace(r"[dim red]\[required][/]", "").strip()
            assert text.endswith("."), param.name
            assert text[0].isupper() or text.startswith("resnet"), param.name


@pytest.mark.parametrize("name", COMMANDS)
def test_one_rule_for_the_names_of_options(name: str) -> None:
    written = {"--output_path", "--out", "-o"}
    for param in COMMANDS[name].params:
        options = set(param.opts)
        if not param.hidden and name != "report":  # where --output_path was what is read
            assert options >= written or not options & written
        assert not options & {"--count", "--cases", "--pairs", "--workers"}


@pytest.mark.parametrize(
    "words", ["--data_path=a --output_path=b", "--data-path a --output-path b", "--data-path a -o b"]
)
def test_hyphens_and_underscores_are_the_same(words: str) -> None:
    told = said("infer", [*words.split(), "--report-path=c", "--parameters-file=d"])
    names = ("data_path", "output_path", "report_path", "parameters_file")
    assert [str(told[name]) for name in names] == ["a", "b", "c", "d"]
    assert said("evaluate", ["a", "b", "--num_workers=3", "--truth_file=c"])["num_workers"] == 3


def test_infer_loads_no_other_command() -> None:
    code = (
        "import sys; from cwdm.cli.app import app; app(['infer', '--help'], standalone_mode=False); "
        "print(*[m.__file__ for n, m in sys.modules.items() if n.startswith('cwdm.cli')], 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    *files, has_torch = done.stdout.splitlines()[-1].split()
    assert {Path(file).stem for file in files} == {"__init__", "app", "infer", "options", "outcomes"}
    assert sum(len(Path(file).read_text().splitlines()) for file in files) <= MOST_LINES_OF_THE_COMMAND_LINE_FOR_INFER
    assert has_torch == "False"


def test_exit_codes(tmp_path: Path) -> None:
    assert process("--version").returncode == 0
    nothing = process("infer", f"--data_path={tmp_path / 'none'}", f"--output_path={tmp_path / 'out'}")
    assert (nothing.returncode, nothing.stderr.startswith("error: ")) == (2, True)
    unknown = process("infre")
    assert (unknown.returncode, "No such command" in unknown.stderr) == (2, True)
    missing = process("drop", str(tmp_path))
    assert (missing.returncode, "expected --output_path, found none" in missing.stderr) == (2, True)
    twice = process("drop", str(tmp_path), str(tmp_path / "a"), "-o", str(tmp_path / "b"))
    assert (twice.returncode, "expected --output_path once" in twice.stderr) == (2, True)


def test_a_fault_of_the_program_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    def fault() -> None:
        raise ZeroDivisionError("a \x1b[31mfault")

    monkeypatch.setattr(module, "app", fault)
    with pytest.raises(SystemExit) as end:
        module.main()
    assert end.value.code == 3
    told = capsys.readouterr().err
    assert "ZeroDivisionError: a \\x1b[31mfault" in told
    assert "error: a fault of the program" in told


def test_phantoms_are_as_small_as_their_voxels_are_large(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["phantom", "--output_path", str(tmp_path), "--spacing", "7"])
    assert result.exit_code == 0, result.output
    image = nib.load(tmp_path / "BraTS-PHANTOM-00000-000" / "BraTS-PHANTOM-00000-000-t1n.nii.gz")
    assert image.shape == (35, 35, 23)
    assert image.header.get_zooms() == (7, 7, 7)


def test_phantoms_with_their_skulls_on_are_the_same_patients(tmp_path: Path) -> None:
    for folder, more in (("bare", ()), ("whole", ("--skull",))):
        result = CliRunner().invoke(app, ["phantom", "-o", str(tmp_path / folder), "--spacing", "7", *more])
        assert result.exit_code == 0, result.output
    for suffix in (*MODALITIES, "seg"):
        name = f"BraTS-PHANTOM-00000-000/BraTS-PHANTOM-00000-000-{suffix}.nii.gz"
        bare, whole = (nib.load(tmp_path / folder / name).get_fdata() for folder in ("bare", "whole"))
        brain = bare > 0
        np.testing.assert_array_equal(whole[brain], bare[brain])
        assert ((whole[~brain] > 0).mean() > 0.5) == (suffix != "seg")


def test_real_cases_get_no_skull(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["phantom", "-o", str(tmp_path / "new"), "--from", str(tmp_path), "--skull"])
    assert isinstance(result.exception, SettingsError)
    assert not (tmp_path / "new").exists()
