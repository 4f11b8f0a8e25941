"""Case folders of the real patients that the bundled weights are trained on.

    python real_data.py SHARED OUT     # OUT/<patient>/<patient>-t1n.nii.gz and so on; needs SimpleITK, takes seconds

SHARED holds `cases/` (skull-stripped cases of four modalities, linked as they are) and `scans/` (raw studies of three,
on grids of their own, with the transforms between them and a brain mask). A scan is interpolated once, through its
transforms put together, onto voxels of 1 mm in the orientation LPS around the brain, and is 0 outside it.
"""

from pathlib import Path
from typing import Annotated

import numpy as np
import SimpleITK as sitk
import typer

from cwdm.arrays import bounding_box

CASES = ("MS-07", "MS-19", "BraTS-TCGA-07294-000")
"""Those that may be trained on; another one that lies beside them is for validation alone."""

STUDIES = ("MSL-01-1", "MSL-01-2", "MSL-04-1", "MSL-12-1", "MSL-12-2")
SCANS = {"t1n": "T1W", "t2w": "T2W", "t2f": "FLAIR"}
MARGIN_MM = 4

app = typer.Typer(help=__doc__, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command()
def main(
    shared: Annotated[Path, typer.Argument(help="Holds cases/ and scans/.")],
    out: Annotated[Path, typer.Argument(help="For the case folders.")],
) -> None:
    """Link the cases and resample the studies; what is there already is left as it is."""
    out.mkdir(parents=True, exist_ok=True)
    for name in CASES:
        if not (out / name).exists():
            (out / name).symlink_to((shared / "cases" / name).resolve(), target_is_directory=True)
    for name in STUDIES:
        write_study(shared / "scans" / name, out / name)


def write_study(scans: Path, folder: Path) -> None:
    """The modalities of a raw study on one grid of 1 mm, stripped."""
    folder.mkdir(exist_ok=True)
    mask = common_mask(sitk.ReadImage(str(scans / "common_brainmask.nii.gz"), sitk.sitkFloat32))
    inside = sitk.GetArrayViewFromImage(mask) > 0
    for modality, scan in SCANS.items():
        path = folder / f"{folder.name}-{modality}.nii.gz"
        if path.exists():
            continue
        image = sitk.ReadImage(str(scans / f"{scan}.nii.gz"), sitk.sitkFloat32)
        resampled = sitk.Resample(image, mask, to_scan(scans, scan), sitk.sitkBSpline, 0.0, sitk.sitkFloat32)
        # At least 1, so that a voxel of the brain is never taken for one of the background.
        voxels = np.where(inside, np.rint(sitk.GetArrayViewFromImage(resampled)).clip(1, 2**15 - 1), 0)
        result = sitk.GetImageFromArray(voxels.astype(np.int16))
        result.CopyInformation(mask)
        partial = path.with_name(f"partial-{path.name}")
        sitk.WriteImage(result, str(partial))
        partial.replace(path)
        print(path)


def to_scan(scans: Path, scan: str) -> sitk.Transform:
    """From points of the patient's common space to those of a scan."""
    to_flair = sitk.ReadTransform(str(scans / "FLAIR_to_common.txt"))
    if scan == "FLAIR":
        return to_flair
    # The last one is applied first.
    return sitk.CompositeTransform([sitk.ReadTransform(str(scans / f"{scan}_to_FLAIR.txt")), to_flair])


def common_mask(mask: sitk.Image) -> sitk.Image:
    """The brain mask on voxels of 1 mm, along the axes of the patient (LPS), with a margin around it."""
    z, y, x = bounding_box(sitk.GetArrayViewFromImage(mask) > 0)
    corners = np.array(
        [
            mask.TransformContinuousIndexToPhysicalPoint([float(i), float(j), float(k)])
            for i in (x.start, x.stop - 1)
            for j in (y.start, y.stop - 1)
            for k in (z.start, z.stop - 1)
        ]
    )
    first = np.floor(corners.min(0)) - MARGIN_MM
    size = np.ceil(corners.max(0) - first).astype(int) + MARGIN_MM
    grid = sitk.Image([int(n) for n in size], sitk.sitkFloat32)
    grid.SetOrigin(first.tolist())
    return sitk.Resample(mask, grid, sitk.Transform(), sitk.sitkLinear, 0.0, sitk.sitkFloat32) > 0.5


if __name__ == "__main__":
    app()
