from .cache import ScoreCache as ScoreCache
from .score import score_pairs as score_pairs
from .sets import evaluate_generated as evaluate_generated
from .tables import Evaluation as Evaluation
from .tables import contrasts as contrasts
from .tables import tables as tables
from .tables import translations as translations
from .tables import write_evaluation as write_evaluation
