"""Reports: one HTML file about a run, because people would rather look than read, and pictures of comparisons.

`page` is the file, `pictures` what is drawn in it, `data` what it is made from: records and volumes.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
