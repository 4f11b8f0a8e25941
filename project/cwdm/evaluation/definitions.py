"""What each metric of `cwdm evaluate` means, which way it is better, and what is open about its rule."""

from dataclasses import dataclass, replace

from cwdm.evaluation.labels import REGIONS


@dataclass(frozen=True)
class Metric:
    """What a number means.

    Attributes:
        title: for people, with the unit.
        higher_is_better: decides which case is the worst.
        rule: how it is computed.
        doubt: what could not be confirmed about the rule it follows; empty where nothing is open.
        region: of the segmentation, one of REGIONS; empty for metrics of images.
        version: of the rule. Raise it when values change: scores that were kept are made again then.
    """

    title: str
    higher_is_better: bool
    rule: str
    doubt: str = ""
    region: str = ""
    version: int = 1


def _of_regions(metrics: dict[str, Metric]) -> dict[str, Metric]:
    """The metrics of every region, whose name takes the place of {} in the titles."""
    return {
        f"{name}_{region}": replace(metric, title=metric.title.format(words), region=region)
        for region, words in REGIONS.items()
        for name, metric in metrics.items()
    }


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
_INSIDE = "inside the mask that is given, or the body of the true image, "
_LESIONWISE = (
    "the published description for glioma (rachitsaluja/BraTS-2023-Metrics): lesions 26-connected, those of the "
    "reference joined that meet when dilated by 3 voxels, those of 50 mm³ or less left out; missed and false lesions "
)
_SURFACES = "the challenge's HD95 weights surfaces by their area, this one counts their voxels"

_OF_TRUE_CASE = {
    "dice": Metric(
        "Dice, {}",
        True,
        "of the same segmenter's segmentations of the true case with this image in place of its own, and as it is; "
        "1 if both are empty",
        version=2,
    ),
    "hd95": Metric(
        "HD95, {} (mm)",
        False,
        "the larger of the two directed 95th percentiles of surface distances; 0 if both are empty, the volume's "
        "diagonal if one is",
        "the challenge's lesion-wise scorer has a fixed penalty of 374 mm and another way of counting surfaces",
        version=2,
    ),
    "lesions_true": Metric("lesions, {}, true case", True, "26-connected components found in the true case", version=2),
    "lesions_missed": Metric(
        "lesions, {}, missed", False, "of those, how many do not touch one in the completed case", version=2
    ),
    "lesions_added": Metric(
        "lesions, {}, added", False, "components in the completed case that touch none in the true case", version=2
    ),
}
_OF_REFERENCE = {
    "reference_dice": Metric(
        "Dice to the reference, {}",
        True,
        "of the segmentation of the completed case and the reference segmentation; 1 if both are empty",
    ),
    "reference_lesionwise_dice": Metric(
        "lesion-wise Dice to the reference, {}", True, _LESIONWISE + "count 0; 1 if there is none"
    ),
    "reference_lesionwise_hd95": Metric(
        "lesion-wise HD95 to the reference, {} (mm)", False, _LESIONWISE + "count 374 mm; 0 if there is none", _SURFACES
    ),
    "reference_lesions": Metric("lesions, {}, reference", True, "those that are scored lesion-wise"),
    "reference_lesions_missed": Metric(
        "lesions of the reference, {}, missed",
        False,
        "of those, how many no lesion of the completed case touches once they are dilated",
    ),
    "reference_lesions_false": Metric(
        "lesions, {}, false", False, "components in the completed case that touch no dilated lesion of the reference"
    ),
}

METRICS = {
    "psnr": Metric("PSNR, volume (dB)", True, _UNIT + "over the whole volume", _PAPER),
    "mse": Metric("MSE, volume", False, _UNIT + "over the whole volume", _PAPER),
    "mae": Metric("MAE, volume", False, _UNIT + "over the whole volume", _PAPER),
    "ssim": Metric(
        "SSIM, volume", True, _UNIT + "Gaussian window of 1.5 voxels, mean but for a rim of 5 voxels", _PAPER
    ),
    "psnr_brain": Metric("PSNR, brain (dB)", True, _UNIT + "over the brain alone"),
    "ssim_brain": Metric("SSIM, brain", True, _UNIT + "mean over the brain alone"),
    "brasyn_2023_ssim": Metric(
        "BraSyn 2023 SSIM",
        True,
        "raw intensities, range the larger span of the two images, mean over the volume but for a rim of 5 voxels",
        _BRASYN_2023,
        version=2,
    ),
    "brasyn_2024_ssim_tumour": Metric(
        "BraSyn 2024 SSIM, tumour",
        True,
        _BRASYN_UNIT + "0 outside the tumour (any label but 0), mean over it",
        _BRASYN_2024,
    ),
    "brasyn_2024_ssim_healthy": Metric(
        "BraSyn 2024 SSIM, healthy",
        True,
        _BRASYN_UNIT + "0 in the tumour, mean over all else, air included",
        _BRASYN_2024,
    ),
    "brasyn_2025_mse_tumour": Metric(
        "BraSyn 2025 MSE, tumour", False, _BRASYN_UNIT + "mean over the tumour", _BRASYN_2025
    ),
    "brasyn_2025_mse_healthy": Metric(
        "BraSyn 2025 MSE, healthy", False, _BRASYN_UNIT + "mean over the brain without the tumour", _BRASYN_2025
    ),
    "target_mae": Metric("MAE (the target's unit)", False, _INSIDE + "intensities as they are"),
    "target_psnr": Metric(
        "PSNR (dB)", True, _INSIDE + "both images clipped to the range that is given, or the true image's"
    ),
    "target_ssim": Metric(
        "SSIM",
        True,
        _INSIDE + "clipped like that, the range's lower end elsewhere, uniform window of 7 voxels with sample "
        "covariances, mean but for a rim of 3 voxels of the volume",
    ),
    **_of_regions(_OF_TRUE_CASE),
    **_of_regions(_OF_REFERENCE),
}
"""In the order of columns and rows."""

VERSIONS = {name: metric.version for name, metric in METRICS.items()}
"""Which version of each rule this program computes by."""
