"""The house: imports point one way, no function or class is too long, and little is loaded that is not needed."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import cwdm

PACKAGE = Path(cwdm.__file__).parent

FLOORS = (
    ("errors", "arrays"),
    (
        "files",
        "temporary",
        "folders",
        "progress",
        "signals",
        "slurm",
        "precision",
        "device",
        "gpu",
        "runner",
        "yaml12",
        "refused",
        "strict",
        "copies",
        "safetensors_file",
        "out_of_memory",
    ),
    ("kernels",),
    (
        "other_wavelets",
        "wavelet",
        "diffusion",
        "samplers",
        "regression",
        "blocks",
        "unet",
        "wavunet",
        "onepass",
        "flow",
        "metrics",
        "calibration",
    ),
    ("published", "checkpoint", "settings"),
    ("images", "weights", "sampling", "pipeline"),
    ("phantoms", "inference", "training", "evaluation", "prepare", "report", "scans"),
    ("cli",),
    ("container", "__main__", "brats_segmenter"),
)
"""From the ground up: a room may use what stands on its own floor or below it."""

FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}

MOST_LINES_OF_A_FUNCTION, MOST_LINES_OF_A_CLASS = 60, 150
MOST_LINES_FOR_INFER = 5470  # on small volumes, where the Winograd sweep is not loaded; 3,600 is the aim


def modules() -> list[Path]:
    """Every module of the package but its face, which hands on names of all floors."""
    return [path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"]


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> Iterator[str]:
    """Dotted names of the modules of the package that a module imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module == "cwdm":
            yield from (f"cwdm.{alias.name}" for alias in node.names if alias.name in FLOOR)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("cwdm."):
            yield node.module or ""
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("cwdm."))


@pytest.mark.parametrize("path", modules(), ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_imports_point_down_and_go_through_a_folder_s_entry(path: Path) -> None:
    room = room_of(path)
    assert room in FLOOR, f"{room} has no floor yet; say in FLOORS where it stands"
    for name in imports(path):
        other = name.split(".")[1]
        assert FLOOR[other] <= FLOOR[room], f"{path.name} imports {name}, which stands above it"
        entered = name.count(".") == 1 or other in (room, "cli")
        assert entered, f"{path.name} imports {name}; its folder's entry is cwdm.{other}"


def test_rooms_of_one_floor_use_each_other_without_a_circle() -> None:
    uses = {room: set[str]() for room in FLOOR}
    for path in modules():
        uses[room_of(path)] |= {name.split(".")[1] for name in imports(path)} - {room_of(path)}
    while free := [room for room, others in uses.items() if not others]:
        for room in free:
            del uses[room]
        for others in uses.values():
            others.difference_update(free)
    assert not uses, f"imports go round in a circle: {uses}"


@pytest.mark.parametrize("path", modules(), ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_functions_and_classes_are_short(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        lines = getattr(node, "end_lineno", 0) - getattr(node, "lineno", 0) + 1
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert lines <= MOST_LINES_OF_A_FUNCTION, f"{node.name}: {lines} lines"
        elif isinstance(node, ast.ClassDef):
            assert lines <= MOST_LINES_OF_A_CLASS, f"{node.name}: {lines} lines"


def loaded_after(code: str, *arguments: str) -> list[str]:
    """Names of all modules that are loaded when some code has run in a fresh process."""
    script = f"{code}\nimport sys\nprint('LOADED', *sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=True)
    return done.stdout.split("LOADED", 1)[1].split()


def run(entry: str, *arguments: str) -> str:
    """Code that runs a command line and goes on."""
    words = [str(argument) for argument in arguments]
    return (
        f"import sys\nfrom {entry} import main\nsys.argv[1:] = {words}\ntry:\n    main()\nexcept SystemExit:\n    pass"
    )


def test_help_does_not_wait_for_torch() -> None:
    for entry in ("cwdm.cli.app", "cwdm.container"):
        assert "torch" not in loaded_after(run(entry, "--help")), entry


def test_making_room_for_weights_does_not_load_the_compiler() -> None:
    code = """
from itertools import product
import torch
from cwdm.unet import UNet, UNetConfig
for skips, targets, regression in product(("concat", "additive", "wavelet"), (0, 4), (False, True)):
    shape = dict(in_channels=40, model_channels=32, channel_mult=(1, 2), skips=skips, regression=regression)
    with torch.device("meta"):
        UNet(UNetConfig(targets=targets, **shape))
with torch.device("meta"):
    UNet(UNetConfig(in_channels=40, out_channels=24, model_channels=32, channel_mult=(1, 2), targets=4, given=4))
"""
    assert not [name for name in loaded_after(code) if name.startswith("torch._dynamo")]


def test_infer_loads_little_of_the_package(cohort: Path, tmp_path: Path) -> None:
    output = tmp_path / "output"
    code = run("cwdm.cli.app", "infer", f"--data_path={cohort}", f"--output_path={output}", "--weights=bundled")
    loaded = [name for name in loaded_after(code) if name == "cwdm" or name.startswith("cwdm.")]
    assert len(list(output.iterdir())) == len(list(cohort.iterdir()))  # it came to its end
    paths = [found for name in loaded if (found := source_of(name))]
    lines = {path.relative_to(PACKAGE).as_posix(): len(path.read_text().splitlines()) for path in paths}
    assert sum(lines.values()) <= MOST_LINES_FOR_INFER, lines


def source_of(module: str) -> Path | None:
    base = PACKAGE.joinpath(*module.split(".")[1:])
    candidates = (base.with_suffix(".py"), base / "__init__.py")
    return next((path for path in candidates if path.is_file()), None)


RAISE_WHERE_THEY_SHOULD_ANSWER = {"exists", "is_file", "is_dir", "is_symlink", "is_mount", "glob", "rglob", "resolve"}
"""Of Path, where a folder may not be entered, a name is too long or links go in a circle; `cwdm.files` has others."""

READ_WHAT_THEY_SHOULD_NOT = {"loads", "read_text", "read_bytes", "model_validate_json", "validate_json"}
"""Of json, Path and pydantic: they follow any nesting and wait at a pipe; `cwdm.files` has `read_json`."""

OWN_FILES = {"files.py", "brats_segmenter.py", "report/html.py"}
"""Where those rules are kept by hand: at their root, in a program that imports nothing of ours, for package data."""


@pytest.mark.parametrize("path", modules(), ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_files_are_looked_at_and_read_through_one_module(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Attribute) or path.relative_to(PACKAGE).as_posix() in OWN_FILES:
            continue
        banned = RAISE_WHERE_THEY_SHOULD_ANSWER | READ_WHAT_THEY_SHOULD_NOT
        assert node.attr not in banned, f"line {node.lineno}: {ast.unparse(node)}"
