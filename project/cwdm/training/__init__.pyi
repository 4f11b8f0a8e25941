from .datasets import list_subjects as list_subjects
from .launch import TrainingError as TrainingError
from .loop import train as train
from .settings import DataSettings as DataSettings
from .settings import load_training_settings as load_training_settings
from .volume_cache import Grid as Grid
from .volume_cache import Subject as Subject
from .volume_cache import decode as decode
