from .ops import Features as Features
from .ops import concatenate as concatenate
from .ops import conv3 as conv3
from .ops import in_layout_of as in_layout_of
from .ops import norm_silu_conv as norm_silu_conv
from .ops import norm_silu_conv_shift as norm_silu_conv_shift
from .ops import shortcut as shortcut
from .resampling import Resample as Resample
