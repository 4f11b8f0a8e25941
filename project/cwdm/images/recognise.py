"""What is a NIfTI file as far as its name or its beginning tells."""

import stat
from pathlib import Path

from isal import isal_zlib

from cwdm.images.nifti import FileError, open_nifti, parse_header


def has_nifti_name(file_name: str) -> bool:
    """Whether a file is called as NIfTI files are, and not hidden."""
    return file_name.lower().endswith((".nii", ".nii.gz")) and not file_name.startswith(".")


def is_nifti(path: Path) -> bool:
    """Whether a file begins as a NIfTI file does; the rest is not read."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe would wait for ever
            return False
        with open_nifti(path) as stream:
            parse_header(stream)
    except (FileError, EOFError, OSError, isal_zlib.IsalError):  # type: ignore[misc]  # its stubs name an instance
        return False
    return True
