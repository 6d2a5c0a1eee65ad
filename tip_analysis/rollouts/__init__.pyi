from .grading import register_grader as register_grader
from .importers.formats import FORMATS as FORMATS
from .importers.formats import import_rollouts as import_rollouts
from .prompts import Prompt as Prompt
from .prompts import read_prompts as read_prompts
from .sampling import Sampling as Sampling
from .stage import sample_rollouts as sample_rollouts
from .stage import store_imported as store_imported
