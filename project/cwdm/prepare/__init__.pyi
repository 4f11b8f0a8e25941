from .complete import complete_cases as complete_cases
from .drop import drop_modalities as drop_modalities
from .lidc import prepare_lidc as prepare_lidc
