"""The figures that `cwdm evaluate` gives: what each means, which way it is better, and what of its rule is open."""

from dataclasses import dataclass

from cwdm.evaluation.segmenters import REGIONS


@dataclass(frozen=True)
class Figure:
    """What a number means.

    Attributes:
        title: for people, with the unit.
        higher_is_better: decides which case is the worst.
        rule: how it is computed.
        doubt: what could not be confirmed about the rule it follows; empty where nothing is open.
        region: of the segmentation, one of REGIONS; empty for figures of images.
        version: of the rule. Raise it when values change: scores that were kept are made again then.
    """

    title: str
    higher_is_better: bool
    rule: str
    doubt: str = ""
    region: str = ""
    version: int = 1


_UNIT = (
    "each image on [0, 1] by its own 0.1 and 99.9 percentiles, as the networks are trained, and 0 outside the brain; "
)
_PAPER = (
    "the paper (arXiv:2411.17203) gives the figure; which scaling, SSIM window and background it used "
    "could not be confirmed"
)
_BRASYN_2023 = (
    "the scorer of 2023 could not be confirmed; this is torchmetrics' SSIM with its defaults as it was then: "
    "since version 1.4.2 the rim counts as well"
)
_BRASYN_2024 = (
    "the published script (hongweilibran/BraSyn, ssim.py) does not run with today's torchmetrics; this is what "
    "its comments say, while some take the mean over the whole volume"
)
_BRASYN_2025 = "only the figure's name could be confirmed; its scaling and regions are those of 2024, brain only"
_BRASYN_UNIT = "each image on [0, 1] by its own 0.5 and 99.5 percentiles; "

FIGURES = {
    "psnr": Figure("PSNR, volume (dB)", True, _UNIT + "over the whole volume", _PAPER),
    "mse": Figure("MSE, volume", False, _UNIT + "over the whole volume", _PAPER),
    "mae": Figure("MAE, volume", False, _UNIT + "over the whole volume", _PAPER),
    "ssim": Figure(
        "SSIM, volume", True, _UNIT + "Gaussian window of 1.5 voxels, mean but for a rim of 5 voxels", _PAPER
    ),
    "psnr_brain": Figure("PSNR, brain (dB)", True, _UNIT + "over the brain alone"),
    "ssim_brain": Figure("SSIM, brain", True, _UNIT + "mean over the brain alone"),
    "brasyn_2023_ssim": Figure(
        "BraSyn 2023 SSIM",
        True,
        "raw intensities, range the larger span of the two images, mean over the volume but for a rim of 5 voxels",
        _BRASYN_2023,
        version=2,
    ),
    "brasyn_2024_ssim_tumour": Figure(
        "BraSyn 2024 SSIM, tumour",
        True,
        _BRASYN_UNIT + "0 outside the tumour (any label but 0), mean over it",
        _BRASYN_2024,
    ),
    "brasyn_2024_ssim_healthy": Figure(
        "BraSyn 2024 SSIM, healthy",
        True,
        _BRASYN_UNIT + "0 in the tumour, mean over all else, air included",
        _BRASYN_2024,
    ),
    "brasyn_2025_mse_tumour": Figure(
        "BraSyn 2025 MSE, tumour", False, _BRASYN_UNIT + "mean over the tumour", _BRASYN_2025
    ),
    "brasyn_2025_mse_healthy": Figure(
        "BraSyn 2025 MSE, healthy", False, _BRASYN_UNIT + "mean over the brain without the tumour", _BRASYN_2025
    ),
}
_INSIDE = "inside the mask that is given, or the body of the true image, "
FIGURES |= {
    "target_mae": Figure("MAE (the target's unit)", False, _INSIDE + "intensities as they are"),
    "target_psnr": Figure(
        "PSNR (dB)", True, _INSIDE + "both images clipped to the range that is given, or the true image's"
    ),
    "target_ssim": Figure(
        "SSIM",
        True,
        _INSIDE + "clipped like that, the range's lower end elsewhere, uniform window of 7 voxels with sample "
        "covariances, mean but for a rim of 3 voxels of the volume",
    ),
}
for _region, _name in REGIONS.items():
    FIGURES |= {
        f"dice_{_region}": Figure(
            f"Dice, {_name}",
            True,
            "of the same segmenter's segmentations of the true case with this image in place of its own, and as it is; "
            "1 if both are empty",
            region=_region,
            version=2,
        ),
        f"hd95_{_region}": Figure(
            f"HD95, {_name} (mm)",
            False,
            "the larger of the two directed 95th percentiles of surface distances; 0 if both are empty, the volume's "
            "diagonal if one is",
            "the challenge's lesion-wise scorer has a fixed penalty of 374 mm and another way of counting surfaces",
            _region,
            version=2,
        ),
        f"lesions_true_{_region}": Figure(
            f"lesions, {_name}, true case",
            True,
            "26-connected components found in the true case",
            region=_region,
            version=2,
        ),
        f"lesions_missed_{_region}": Figure(
            f"lesions, {_name}, missed",
            False,
            "of those, how many do not touch one in the completed case",
            region=_region,
            version=2,
        ),
        f"lesions_added_{_region}": Figure(
            f"lesions, {_name}, added",
            False,
            "components in the completed case that touch none in the true case",
            region=_region,
            version=2,
        ),
    }
_LESIONWISE = (
    "the published description for glioma (rachitsaluja/BraTS-2023-Metrics): lesions 26-connected, those of the "
    "reference joined that meet when dilated by 3 voxels, those of 50 mm³ or less left out; missed and false lesions "
)
_SURFACES = "the challenge's HD95 weights surfaces by their area, this one counts their voxels"
for _region, _name in REGIONS.items():
    FIGURES |= {
        f"reference_dice_{_region}": Figure(
            f"Dice to the reference, {_name}",
            True,
            "of the segmentation of the completed case and the reference segmentation; 1 if both are empty",
            region=_region,
        ),
        f"reference_lesionwise_dice_{_region}": Figure(
            f"lesion-wise Dice to the reference, {_name}",
            True,
            _LESIONWISE + "count 0; 1 if there is none",
            region=_region,
        ),
        f"reference_lesionwise_hd95_{_region}": Figure(
            f"lesion-wise HD95 to the reference, {_name} (mm)",
            False,
            _LESIONWISE + "count 374 mm; 0 if there is none",
            _SURFACES,
            _region,
        ),
        f"reference_lesions_{_region}": Figure(
            f"lesions, {_name}, reference", True, "those that are scored lesion-wise", region=_region
        ),
        f"reference_lesions_missed_{_region}": Figure(
            f"lesions of the reference, {_name}, missed",
            False,
            "of those, how many no lesion of the completed case touches once they are dilated",
            region=_region,
        ),
        f"reference_lesions_false_{_region}": Figure(
            f"lesions, {_name}, false",
            False,
            "components in the completed case that touch no dilated lesion of the reference",
            region=_region,
        ),
    }

RULES = {name: figure.version for name, figure in FIGURES.items()}
"""Which version of each rule this program computes by."""
