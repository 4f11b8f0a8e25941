from .grids import box_average as box_average
from .grids import cubic as cubic
from .grids import linear as linear
from .patients import make_phantom as make_phantom
from .patients import write_phantoms as write_phantoms
from .skull import add_skull as add_skull
from .variation import WIDE as WIDE
