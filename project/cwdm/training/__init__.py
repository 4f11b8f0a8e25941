"""Training: `train` takes settings from data to weights.

`loop` reads from the data to a step; `launch` is where it runs, `data` what it sees, `validate` how it is scored,
`state` what is kept, `log` what a person sees.
"""

from cwdm.training.launch import TrainingError
from cwdm.training.loop import train

__all__ = ["TrainingError", "train"]
