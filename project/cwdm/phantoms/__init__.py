"""Physics-based synthetic patients: a folded brain with a glioma, in four modalities, on demand."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
