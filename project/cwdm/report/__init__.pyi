from .data import ReportPaths as ReportPaths
from .page import write_report as write_report
from .pictures import Comparison as Comparison
from .pictures import draw_comparisons as draw_comparisons
