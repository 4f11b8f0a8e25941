"""3D wavelet diffusion for medical images: WDM and cWDM.

>>> from cwdm import Synthesizer, Settings
>>> Synthesizer("weights/")("input/BraTS-GLI-00001-000").volume     # doctest: +SKIP
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Pipeline", "Settings", "Synthesizer", "__version__"]

if TYPE_CHECKING:
    from cwdm.inference import Synthesizer
    from cwdm.pipeline import Pipeline
    from cwdm.settings import Settings


def __getattr__(name: str) -> Any:
    # Imported on first use: `cwdm --help` should not wait for PyTorch.
    if name == "Synthesizer":
        from cwdm.inference import Synthesizer

        return Synthesizer
    if name == "Pipeline":
        from cwdm.pipeline import Pipeline

        return Pipeline
    if name == "Settings":
        from cwdm.settings import Settings

        return Settings
    raise AttributeError(f"module 'cwdm' has no attribute '{name}'")
