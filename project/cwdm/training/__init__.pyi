from .launch import TrainingError as TrainingError
from .loop import train as train
from .settings import DataSettings as DataSettings
from .settings import load_training_settings as load_training_settings
