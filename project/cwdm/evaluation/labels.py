"""The labels of segmentations: the regions that they make up, by the schemes of the BraTS challenges."""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from cwdm.arrays import Volume
from cwdm.errors import InputError

Labels = npt.NDArray[np.uint8]

REGIONS = {"wt": "whole tumour", "tc": "tumour core", "et": "enhancing tumour", "rc": "resection cavity"}

Scheme = Mapping[str, tuple[int, ...]]
"""What the labels of a segmentation mean: region -> its labels."""

TODAY = "2023"
SCHEMES: dict[str, Scheme] = {
    # 1 necrotic or non-enhancing core, 2 oedema, 3 enhancing tumour, and in treated patients 4 resection cavity,
    # which is no part of the tumour.
    TODAY: {"wt": (1, 2, 3), "tc": (1, 3), "et": (3,), "rc": (4,)},
    # Up to 2022 the enhancing tumour was 4, and there was no 3.
    "2020": {"wt": (1, 2, 4), "tc": (1, 4), "et": (4,)},
}
"""Label schemes of the BraTS challenges by the first year or one that they were used in."""


def labels_of(volume: Volume, source: str, scheme: Scheme = SCHEMES[TODAY]) -> Labels:
    """Check that a volume holds labels of a scheme.

    Raises:
        InputError: it holds anything else.
    """
    known = sorted({0, *(label for labels in scheme.values() for label in labels)})
    if strange := [value for value in np.unique(volume).tolist() if value not in known]:
        found = ", ".join(f"{value:g}" for value in strange[:5])
        raise InputError(
            f"{source}: expected labels {', '.join(map(str, known))}, found {found}; give a segmentation with BraTS "
            f"labels, or the scheme that it follows (--labels)"
        )
    return volume.astype(np.uint8)


def label_doubt(volume: npt.NDArray[np.generic], source: str, scheme: Scheme) -> str:
    """What to know of labels that may follow the older scheme; empty where there is nothing."""
    present = set(np.unique(volume).tolist())
    if scheme != SCHEMES[TODAY] or 4 not in present or 3 in present:
        return ""
    return f"{source}: label 4 and no 3; 4 counts as resection cavity, if it is enhancing tumour give --labels 2020"
