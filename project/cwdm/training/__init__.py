"""Training: `train` takes settings from data to weights.

`loop` reads from the data to a step; `launch` is where it runs, `data` what it sees, `validate` how it is scored,
`state` what is kept, `log` what a person sees.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
