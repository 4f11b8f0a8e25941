"""3D wavelet diffusion for medical images: WDM and cWDM."""

__version__ = "0.1.0"
