"""An automatic check of the way into a space: `ok`, `review` or `reject`, with the reasons in plain words.

It asks whether a registration can be right from what it left: masks, mutual information, and whether the images would
fit better when turned or mirrored. It knows no truth. What it catches and what it misses is the table that
`benchmarks/scans.py planted` prints. A study of which every image is mirrored alike cannot be told from a sound one.
"""

from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

import numpy as np

from cwdm.arrays import Mask
from cwdm.scans.align import Aligned
from cwdm.scans.itk import Matrix, covered, inverse_of, sitk, to_transform
from cwdm.scans.register import (
    SEARCH_MM,
    Brain,
    about,
    centre_of,
    coarser,
    fits,
    information,
    quarter_turns,
    register,
)

Verdict = Literal["ok", "review", "reject"]
VERDICTS: tuple[Verdict, ...] = ("ok", "review", "reject")

NEVER = np.inf
_INFORMATION_MM = 2.0
_DISPLACED_MM = 5.0
_TURNED_DEG = 45.0
"""Turn against what was found from which on a fit is another one."""

_MIRRORED_LEVELS_MM = (4.0, 2.0)


class Judgement(NamedTuple):
    """What the check says of one patient.

    Attributes:
        verdict: the gravest of all.
        reasons: in plain words, the gravest first.
        metrics: name -> what was measured.
    """

    verdict: Verdict
    reasons: tuple[str, ...]
    metrics: dict[str, float]

    @property
    def findings(self) -> list[str]:
        """What a person is told, a line each."""
        return [f"{self.verdict}: {reason}" for reason in self.reasons]


class Pair:
    """Two images that were laid over each other: one of the patient's to the reference, or that one to the atlas.

    Attributes:
        fixed, moving: as the measure sees them.
        matrix: points of the fixed to points of the moving one.
    """

    def __init__(self, aligned: Aligned, modality: str, fixed: Brain, matrix: Matrix) -> None:
        self.aligned, self.modality, self.matrix = aligned, modality, matrix
        self.fixed, self.moving = fixed, aligned.brains[modality]
        self.fine = coarser(self.fixed, _INFORMATION_MM), coarser(self.moving, _INFORMATION_MM)
        self.coarse = coarser(self.fixed, SEARCH_MM), coarser(self.moving, SEARCH_MM)
        self.information = information(*self.fine, matrix)

    def brain_ml(self) -> float:
        return self.aligned.heads[self.modality].brain_ml

    def overlap(self) -> float:
        """Share of the smaller mask that lies in the other, of what both images reach."""
        grid = self.fixed.mask
        moved = _moved(sitk.Cast(self.moving.mask, sitk.sitkFloat32), grid, self.matrix)
        reached = _moved(sitk.Cast(self.moving.mask, sitk.sitkFloat32) * 0 + 1, grid, self.matrix)
        first, second = (sitk.GetArrayViewFromImage(grid) > 0) & reached, moved
        both, *sizes = (float(np.sum(mask)) for mask in (first & second, first, second))
        return both / min(sizes) if min(sizes) else 0.0

    def gain(self) -> float:
        """Mutual information that registration brought, in nats."""
        return self.information - information(*self.fine, np.eye(4))

    def sharpness(self) -> float:
        """Share of the mutual information that is lost where the image is displaced by 5 mm; 0 where nothing fits."""
        lost = []
        for axis in range(3):
            for step in (-_DISPLACED_MM, _DISPLACED_MM):
                away = np.eye(4)
                away[axis, 3] = step
                lost.append(self.information - information(*self.fine, self.matrix @ away))
        return float(np.mean(lost)) / self.information if self.information > 0 else 0.0

    def turned(self) -> float:
        """Mutual information of the best fit after a quarter or half turn, of what was found; 0 where none holds.

        A fit that walks back from its start to where the image was found says nothing against that.
        """
        found, centre = information(*self.coarse, self.matrix), centre_of(self.fixed.mask)
        starts = [self.matrix @ about(turn, centre) for turn in quarter_turns()]
        turned = [matrix for matrix in fits(*self.coarse, starts) if _degrees(matrix, self.matrix) >= _TURNED_DEG]
        return max((information(*self.coarse, matrix) for matrix in turned), default=0.0) / max(found, 1e-6)

    def mirrored(self) -> float:
        """Mutual information of the best fit of the mirrored image, of what was found."""
        mirror = Brain(*(_mirrored(image) for image in self.moving))
        found = register(self.fixed, mirror, _MIRRORED_LEVELS_MM)
        return found.information / max(self.information, 1e-6)

    def degrees(self) -> float:
        return _degrees(self.matrix, np.eye(4))

    def shift_mm(self) -> float:
        """How far the centre of the brain moved."""
        centre = np.append(centre_of(self.fixed.mask), 1)
        return float(np.linalg.norm((self.matrix @ centre - centre)[:3]))

    def coverage(self) -> float:
        """Share of the patient's brain that the image reaches."""
        space, image = self.aligned.space, self.aligned.heads[self.modality].image
        reached = covered(image, space.shape, space.affine, self.aligned.matrices[self.modality])
        return float(reached[self.aligned.brain].mean()) if self.aligned.brain.any() else 0.0


def _degrees(first: Matrix, second: Matrix) -> float:
    """Angle between two movements."""
    cosine = (np.trace(first[:3, :3] @ second[:3, :3].T) - 1) / 2
    return float(np.degrees(np.arccos(np.clip(cosine, -1, 1))))


def _moved(image: sitk.Image, onto: sitk.Image, matrix: Matrix) -> Mask:
    moved = sitk.Resample(image, onto, to_transform(matrix), sitk.sitkLinear, 0.0)
    inside: Mask = sitk.GetArrayFromImage(moved) >= 0.5
    return inside


def _mirrored(image: sitk.Image) -> sitk.Image:
    """The image with left and right exchanged, in the same place."""
    direction = np.abs(np.reshape(image.GetDirection(), (3, 3)))
    axis = int(np.argmax(direction[0]))
    flipped = sitk.Flip(image, [other == axis for other in range(3)])
    flipped.CopyInformation(image)
    return flipped


class Check(NamedTuple):
    """A row of the table of checks.

    Attributes:
        metric: the value's name; the record puts the modality behind it.
        measure: see `Pair`.
        limits: from which value on the patient should be reviewed, and from which on rejected. Low values are the
            faulty ones where the second is below the first.
        message: with `{value}`, `{percent}` and `{images}`.
    """

    metric: str
    measure: Callable[[Pair], float]
    limits: tuple[float, float]
    message: str


OF_EACH = (
    # Adults have 950 to 1,800 ml; with ventricles and rims that masks differ by, 900 to 2,000.
    Check("brain_ml", Pair.brain_ml, (900, 500), "the brain in {modality} has only {value:.0f} ml"),
    Check("brain_ml", Pair.brain_ml, (2000, 2600), "the brain in {modality} has {value:.0f} ml"),
    Check("coverage", Pair.coverage, (0.97, 0.80), "{modality} reaches only {percent} of the brain"),
)

WITHIN_STUDY = (
    Check("overlap", Pair.overlap, (0.93, 0.85), "the brains of {images} overlap by {percent} only"),
    Check("sharpness", Pair.sharpness, (0.15, 0.05), "{images} fit hardly better than 5 mm aside"),
    Check("gain", Pair.gain, (-0.01, -0.10), "{images} fit better where the headers put them"),
    Check("turned", Pair.turned, (0.90, 1.0), "{images} fit as well when one is turned by 90 or 180 degrees"),
    Check("mirrored", Pair.mirrored, (0.98, 1.0), "{images} fit as well when one is mirrored left to right"),
    Check("degrees", Pair.degrees, (25, NEVER), "{images} are turned by {value:.0f} degrees against their headers"),
    Check("shift_mm", Pair.shift_mm, (60, NEVER), "{images} are {value:.0f} mm apart by their headers"),
)

TO_ATLAS = (
    Check("overlap", Pair.overlap, (0.90, 0.80), "the brains of {images} overlap by {percent} only"),
    Check("sharpness", Pair.sharpness, (0.05, 0.0), "{images} fit hardly better than 5 mm aside"),
    Check("turned", Pair.turned, (0.97, 1.0), "{images} fit as well when one is turned by 90 or 180 degrees"),
    Check("degrees", Pair.degrees, (45, NEVER), "{images} are turned by {value:.0f} degrees against the header"),
)


def judge(aligned: Aligned) -> Judgement:
    """Check a patient's way into a space."""
    metrics: dict[str, float] = {}
    found: list[tuple[Verdict, str]] = []
    for check, name, value, words in _measured(aligned):
        metrics[f"{check.metric}_{name}"] = float(f"{value:.4g}")
        if (verdict := _verdict(check, value)) != "ok":
            found.append((verdict, check.message.format(value=value, percent=f"{value:.0%}", **words)))
    found.sort(key=lambda reason: -VERDICTS.index(reason[0]))
    return Judgement(found[0][0] if found else "ok", tuple(dict.fromkeys(text for _, text in found)), metrics)


def _measured(aligned: Aligned) -> Iterator[tuple[Check, str, float, dict[str, str]]]:
    reference, space = aligned.reference, aligned.space
    back = inverse_of(aligned.matrices[reference])
    for modality in aligned.heads:
        own = Pair(aligned, modality, aligned.brains[reference], aligned.matrices[modality] @ back)
        checks = OF_EACH if modality == reference else OF_EACH + WITHIN_STUDY
        for check in checks:
            yield check, modality, check.measure(own), {"modality": modality, "images": f"{modality} and {reference}"}
    if space.atlas is not None:
        pair = Pair(aligned, reference, space.atlas, aligned.matrices[reference])
        for check in TO_ATLAS:
            yield check, space.name, check.measure(pair), {"images": f"{reference} and the atlas"}


def _verdict(check: Check, value: float) -> Verdict:
    review, reject = check.limits
    if reject < review:
        value, review, reject = -value, -review, -reject
    return "reject" if value >= reject else "review" if value >= review else "ok"
