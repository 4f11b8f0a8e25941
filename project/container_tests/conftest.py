"""The image, built once, the cases it is run on, and the real clients that run it."""

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from engine import IMAGE, ROOT, STATE, Engine, NoEngine, build_context, build_image, running_engine

from cwdm.images.cases import find_cases
from cwdm.checkpoint import Record
from cwdm.prepare.drop import drop_modalities
from cwdm.phantoms.scanner import write_phantoms
from cwdm.unet import UNetConfig
from cwdm.weights.untrained import write_untrained

TINY = UNetConfig(in_channels=32, model_channels=32, channel_mult=(1, 2))
REAL = ROOT.parent / "shared/cases"
CWDM = Path(sys.executable).with_name("cwdm")


@pytest.fixture(scope="session")
def engine() -> Iterator[Engine]:
    """A container engine; where none can be had, a failure in CI and a skip on a laptop."""
    try:
        with running_engine() as engine:
            yield engine
    except NoEngine as error:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(str(error))


@pytest.fixture(scope="session")
def context(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the image is built from; tests put weights into copies of it."""
    return build_context(tmp_path_factory.mktemp("context"))


@pytest.fixture(scope="session")
def image(engine: Engine, context: Path) -> str:
    """The project's own image, built with the weights that come with it."""
    built = build_image(engine, context, IMAGE)
    assert built.returncode == 0, built.stderr[-5000:]
    return IMAGE


@pytest.fixture(scope="session")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three phantoms, each without another contrast, and where they are at hand the real cases; only read."""
    complete, folder = tmp_path_factory.mktemp("complete"), tmp_path_factory.mktemp("cases")
    write_phantoms(complete, 3, seed=4, shape=(44, 52, 40), spacing_mm=4.5)
    drop_modalities(complete, folder, seed=1, copy=True)
    assert len({case.missing for case in find_cases(folder)}) > 1
    return readable(folder)


@pytest.fixture(scope="session")
def expected(cases: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the bare command line makes of the cases."""
    return infer_bare(cases, tmp_path_factory.mktemp("expected"))


def infer_bare(cases: Path, out: Path, *options: str) -> Path:
    """Run the command line of this checkout with the bundled weights."""
    command = [CWDM, "infer", f"--data_path={cases}", f"--output_path={out}", *(options or ["--weights=bundled"])]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="session")
def tiny_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of a small network for each contrast, whose images differ from those of the bundled ones."""
    folder = tmp_path_factory.mktemp("weights")
    write_untrained(folder, TINY, Record(sampler="ddim", steps=2))
    return readable(folder)


@pytest.fixture(scope="session")
def expected_tiny(cases: Path, tiny_weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the bare command line makes of the cases with `tiny_weights`."""
    return infer_bare(cases, tmp_path_factory.mktemp("expected-tiny"), f"--weights={tiny_weights}")


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """An empty folder that any user may write to."""
    folder = tmp_path / "output"
    folder.mkdir()
    readable(folder).chmod(0o777)
    return folder


@pytest.fixture(scope="session")
def clients(engine: Engine) -> "Clients":
    """Environments with the packages that run images: mlcube and brats."""
    folder = STATE if engine.own else Path.home() / ".cache/cwdm-container-test"
    return Clients(
        engine,
        _environment(folder / "mlcube", ["pip<24.1"], ["-r", str(ROOT / "mlcube/mlcube/requirements.txt")]),
        _environment(folder / "brats", ["pip"], ["brats==0.1.14"]),
    )


def _environment(folder: Path, *packages: list[str]) -> Path:
    if not (folder / "ready").exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        for wanted in packages:
            subprocess.run([folder / "bin/pip", "install", "--quiet", *wanted], check=True, stderr=subprocess.DEVNULL)
        (folder / "ready").touch()
    return folder / "bin"


@dataclass(frozen=True)
class Clients:
    """Programs that run images, each in an environment of its own."""

    engine: Engine
    mlcube_bin: Path
    brats_bin: Path

    def mlcube(self, *arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
        return self._run(self.mlcube_bin / "mlcube", *arguments, cwd=cwd)

    def brats(self, script: str, cwd: Path) -> subprocess.CompletedProcess[str]:
        return self._run(self.brats_bin / "python", "-c", script, cwd=cwd)

    def brats_segmenter(self, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        # From the package's folder, since this environment has brats alone.
        return self._run(self.brats_bin / "python", "-m", "cwdm.brats_segmenter", *arguments, cwd=ROOT / "project")

    def _run(self, *command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
        path = os.pathsep.join((str(Path(shutil.which(self.engine.client) or "").parent), os.environ["PATH"]))
        environment = {**self.engine.environment, "PATH": path}
        return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=600)


def readable(folder: Path) -> Path:
    """The folder, open to any user of a container."""
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    for parent in folder.parents:
        if parent.stat().st_uid == os.getuid() and parent.parent != parent:
            parent.chmod(parent.stat().st_mode | 0o055)
    return folder


def fingerprint(folder: Path) -> dict[str, str]:
    """Name and checksum of every file below a folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def names(folder: Path) -> list[str]:
    """What is in a folder, hidden files too."""
    return sorted(path.name for path in folder.iterdir())


def assert_same_images(found: Path, expected: Path) -> None:
    """The same files, nothing else, each with the same image data, type and geometry."""
    assert names(found) == names(expected)
    for name in names(expected):
        a, b = nib.load(found / name), nib.load(expected / name)
        np.testing.assert_array_equal(np.asanyarray(a.dataobj), np.asanyarray(b.dataobj))
        np.testing.assert_array_equal(a.affine, b.affine)
        assert a.get_data_dtype() == b.get_data_dtype()
        assert a.header["qform_code"] == b.header["qform_code"]
