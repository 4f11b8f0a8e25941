"""DICOM series to NIfTI by dcm2niix, as a process of its own: what it reads is hostile until proven otherwise."""

import subprocess
import tempfile
from contextlib import suppress
from pathlib import Path

from cwdm.errors import CaseError, needs_extra
from cwdm.files import matching
from cwdm.scans.series import Series

SECONDS = 300
"""Time limit; a series of 200 slices takes one or two."""

_MOST_MEMORY = 16 << 30


def convert_series(patient: str, series: Series, folder: Path) -> Path:
    """The one 3D image of a series as NIfTI, with its JSON sidecar beside it.

    Args:
        patient: for messages.
        folder: for temporary files.

    Raises:
        CaseError: it cannot be converted, or is not one 3D image.
    """
    with needs_extra("scans", "the converter from DICOM"):
        import dcm2niix
    staged, made = (Path(tempfile.mkdtemp(prefix=f"{name}-", dir=folder)) for name in ("dicom", "nifti"))
    for number, file in enumerate(series.files):
        (staged / f"{number:05d}.dcm").symlink_to(file.absolute())
    # No gzip, which nobody would read twice; no cropping, which would lose the scanner's grid; no merging by force.
    options = ["-b", "y", "-z", "n", "-x", "n", "-f", "image", "-w", "0", "-o", str(made)]
    log = _run([dcm2niix.bin, *options, str(staged)], patient, series)
    images = matching(made, "*.nii")
    if len(images) != 1:
        names = ", ".join(path.name for path in images) or "none"
        raise CaseError(
            patient,
            f"{series.label}: expected one 3D image, dcm2niix made {len(images)} ({names}); "
            f"convert it by hand and give the NIfTI file. It said: {log}",
        )
    return images[0]


def _run(command: list[str], patient: str, series: Series) -> str:
    try:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd="/", env={}
        )
    except OSError as error:
        raise CaseError(patient, f"dcm2niix cannot be started: {error.strerror}") from error
    with process:
        _limit_memory(process.pid)
        try:
            output, _ = process.communicate(timeout=SECONDS)
        except BaseException as error:
            process.kill()
            if isinstance(error, subprocess.TimeoutExpired):
                reason = f"{series.label}: dcm2niix did not end within {SECONDS} s; convert it by hand"
                raise CaseError(patient, reason) from error
            raise
    log = " ".join(output.decode(errors="replace").split())[-400:]
    if process.returncode != 0:
        ended = f"with status {process.returncode}" if process.returncode > 0 else f"by signal {-process.returncode}"
        raise CaseError(patient, f"{series.label}: dcm2niix ended {ended}; export the series again. It said: {log}")
    return log


def _limit_memory(pid: int) -> None:
    with suppress(ImportError, AttributeError, OSError, ValueError):  # Linux alone can, and the process may have ended
        import resource

        resource.prlimit(pid, resource.RLIMIT_AS, (_MOST_MEMORY, _MOST_MEMORY))
