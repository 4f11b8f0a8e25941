"""Case folders, NIfTI files, intensities and geometry: the only place that knows file names and formats."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
