from .door import score as score
from .scorer import Scorer as Scorer
from .stage import score_rollouts as score_rollouts
