from .scanner import WIDE as WIDE
from .scanner import make_phantom as make_phantom
from .scanner import write_phantoms as write_phantoms
