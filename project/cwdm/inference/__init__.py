"""From a case folder to its finished volume, for one case or for thousands."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
