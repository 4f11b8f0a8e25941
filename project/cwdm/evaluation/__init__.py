"""How good synthesised images are: metrics of one, tables of many, and what segmenters make of them."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
