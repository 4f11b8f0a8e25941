from .launch import TrainingError as TrainingError
from .loop import train as train
from .settings import DataSettings as DataSettings
from .settings import load_training_settings as load_training_settings
from .volumes import Grid as Grid
from .volumes import Subject as Subject
from .volumes import decode as decode
from .volumes import list_subjects as list_subjects
