"""Cases as `cwdm infer --report_path` leaves them, without a network: what is said to be synthesised is given."""

import json
from pathlib import Path

import numpy as np
from support import link_case

from cwdm.images import output_name, read_grid, write_nifti
from cwdm.report import ReportPaths

MODALITY = "t1n"


def add_case(root: Path, source: Path, name: str, noise: float = 0.05, verdict: str = "ok") -> ReportPaths:
    """Add a case to root/report, input, output and truth.

    Args:
        source: folder of a complete case.
        noise: of the image that is said to be synthesised, in units of the true one's largest value.
    """
    for folder in ("report", "output"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    case = link_case(source, root / "input", MODALITY, name)
    link_case(source, root / "truth", "none", name)
    true = read_grid(source / output_name(source.name, MODALITY))
    output = root / "output" / output_name(name, MODALITY)
    random = np.random.default_rng(0).standard_normal(true.volume.shape).astype(np.float32)
    image = true.volume + np.float32(noise) * true.volume.max() * random * (true.volume != 0)
    write_nifti(output, image, true.affine)
    record = {
        "case": name,
        "modality": MODALITY,
        "status": "written",
        "input": str(case),
        "output": str(output),
        "quality": {"verdict": verdict, "reasons": [] if verdict == "ok" else ["a reason"]},
    }
    (root / "report" / f"{name}-{MODALITY}.json").write_text(json.dumps(record))
    return ReportPaths(root / "report", truth=root / "truth")


def mirror(path: Path, axis: int) -> None:
    """Store the same image in another voxel order."""
    true = read_grid(path)
    affine = true.affine.copy()
    affine[:3, axis] *= -1
    affine[:3, 3] += true.affine[:3, axis] * (true.volume.shape[axis] - 1)
    path.unlink()
    write_nifti(path, np.flip(true.volume, axis), affine)
