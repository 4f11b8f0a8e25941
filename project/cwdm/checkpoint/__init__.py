"""Weights on disk: the published `.pt` files and our safetensors, both checked before any of them is trusted.

Our files carry everything needed to use them in their header: the network's configuration, the modality, the
wavelet, the recommended sampler and the training record. The published files carry nothing, so the architecture
is read off the names and shapes of their tensors (`cwdm.published`).
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
