"""3D wavelet diffusion for medical images: WDM and cWDM.

>>> from cwdm import Synthesizer, Settings
>>> Synthesizer("weights/")("input/BraTS-GLI-00001-000").volume     # doctest: +SKIP
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from cwdm.evaluation import evaluate
    from cwdm.inference import Synthesizer
    from cwdm.pipeline import Pipeline
    from cwdm.samplers import ddim, ddpm, dpmpp
    from cwdm.settings import Settings
    from cwdm.training import train
    from cwdm.unet import UNet, UNetConfig
    from cwdm.wavelet import dwt, idwt

__all__ = [
    "Pipeline",
    "Settings",
    "Synthesizer",
    "UNet",
    "UNetConfig",
    "ddim",
    "ddpm",
    "dpmpp",
    "dwt",
    "evaluate",
    "idwt",
    "train",
]

_HOMES = {
    "inference": ("Synthesizer",),
    "settings": ("Settings",),
    "pipeline": ("Pipeline",),
    "unet": ("UNet", "UNetConfig"),
    "wavelet": ("dwt", "idwt"),
    "samplers": ("ddpm", "ddim", "dpmpp"),
    "training": ("train",),
    "evaluation": ("evaluate",),
}


def __getattr__(name: str) -> Any:
    # Imported on first use, without a library: help should not wait for PyTorch, and brats_segmenter runs without any.
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"cwdm.{home}"), name)
    raise AttributeError(f"module 'cwdm' has no attribute '{name}'")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
