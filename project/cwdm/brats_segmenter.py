"""Segmentation algorithms of past BraTS challenges, from the `brats` package, as a segmenter's command.

    cwdm evaluate PRED TRUTH --segmenter "python -m cwdm.brats_segmenter {input} {output}"

Needs `pip install brats` and Docker, and fetches the algorithm's image, several GB, at its first use. It imports
nothing else of cwdm: where `brats` is in another environment, PYTHONPATH=project and that environment's Python do.
"""

import argparse
import sys
from pathlib import Path

MODALITIES = ("t1c", "t1n", "t2f", "t2w")
PRE_AND_POST = "AdultGliomaPreAndPostTreatment"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input", type=Path, help="folder of a case, with four files <case>-<modality>.nii.gz")
    parser.add_argument("output", type=Path, help="the segmentation to write")
    parser.add_argument("--challenge", default=PRE_AND_POST, help="also AdultGliomaPreTreatment, Meningioma, GoAT, …")
    parser.add_argument("--algorithm", help="such as BraTS25_2; default: the one that brats takes for the challenge")
    parser.add_argument("--timepoint", choices=("pre", "post"), default="pre", help=f"of {PRE_AND_POST}")
    parser.add_argument("--cuda-devices", default="0")
    parser.add_argument("--force-cpu", action="store_true")
    arguments = parser.parse_args()
    try:
        segment(arguments)
    except Exception as error:  # algorithms are other people's programs
        sys.exit(f"{type(error).__name__}: {error}")


def segment(arguments: argparse.Namespace) -> None:
    """Run the algorithm.

    Raises:
        ValueError: `brats` knows no such challenge or algorithm.
        FileNotFoundError: the case is not complete.
    """
    import brats
    from brats import constants

    images = {}
    for modality in MODALITIES:
        found = next(arguments.input.glob(f"*-{modality}.nii*"), None)
        if found is None:
            raise FileNotFoundError(f"{arguments.input} has no {modality}; give a folder with {', '.join(MODALITIES)}")
        images[modality] = found
    segmenter = getattr(brats, f"{arguments.challenge}Segmenter", None)
    algorithms = getattr(constants, f"{arguments.challenge}Algorithms", None)
    if segmenter is None or algorithms is None:
        raise ValueError(f"brats knows {', '.join(challenges())}, and no challenge {arguments.challenge!r}")
    chosen = {"cuda_devices": arguments.cuda_devices, "force_cpu": arguments.force_cpu}
    if arguments.algorithm:
        names = [algorithm.name for algorithm in algorithms]
        if arguments.algorithm not in names:
            raise ValueError(f"{arguments.challenge} has {', '.join(names)}, and no algorithm {arguments.algorithm!r}")
        chosen["algorithm"] = algorithms[arguments.algorithm]
    if arguments.challenge == PRE_AND_POST:
        chosen["treatment_timepoint"] = arguments.timepoint
    segmenter(**chosen).infer_single(**images, output_file=arguments.output)


def challenges() -> list[str]:
    """The challenges whose algorithms take all four modalities."""
    import brats
    from brats.core.segmentation_algorithms import SegmentationAlgorithmWith4Modalities as FourModalities

    found = {name: value for name, value in vars(brats).items() if isinstance(value, type)}
    return sorted(name.removesuffix("Segmenter") for name, value in found.items() if issubclass(value, FourModalities))


if __name__ == "__main__":
    main()
