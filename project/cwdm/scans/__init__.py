"""Scans as they come from scanners: found, named, brought to the networks and back."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
