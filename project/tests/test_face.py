"""What stands on the face of the package."""

import subprocess
import sys

import pytest

import cwdm

NAMES = {"Synthesizer", "Settings", "Pipeline", "UNet", "UNetConfig", "dwt", "idwt"} | {
    "ddpm",
    "ddim",
    "dpmpp",
    "train",
    "evaluate",
}


def test_twelve_names_and_no_others() -> None:
    assert {name for name in dir(cwdm) if not name.startswith("_")} == NAMES == set(cwdm.__all__)
    assert len(cwdm.__all__) == 12
    for name in NAMES:
        assert callable(getattr(cwdm, name)), name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = cwdm.nothing


def test_nothing_is_imported_before_it_is_used() -> None:
    """Not even libraries: the segmenter of past challenges runs where there are none."""
    code = "import cwdm, sys; dir(cwdm); print({'torch', 'numpy', 'lazy_loader', 'rich'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
