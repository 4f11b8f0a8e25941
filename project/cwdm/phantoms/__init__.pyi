from .patients import make_phantom as make_phantom
from .patients import write_phantoms as write_phantoms
from .variation import WIDE as WIDE
