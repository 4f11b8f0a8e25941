"""What several tests need, besides fixtures."""

import hashlib
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
from engine import ROOT, Engine

from cwdm.unet import UNetConfig

TINY = UNetConfig(in_channels=32, model_channels=32, channel_mult=(1, 1), num_res_blocks=1)
REAL = ROOT.parent / "shared/cases"
CWDM = Path(sys.executable).with_name("cwdm")


def infer_bare(cases: Path, out: Path, *options: str) -> Path:
    """Run the command line of this checkout with the bundled weights."""
    command = [CWDM, "infer", f"--data_path={cases}", f"--output_path={out}", *(options or ["--weights=bundled"])]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    return out


def _environment(folder: Path, *packages: list[str]) -> Path:
    if not (folder / "ready").exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        for wanted in packages:
            command = [folder / "bin/pip", "install", "--quiet", "--no-compile", *wanted]
            subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
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
