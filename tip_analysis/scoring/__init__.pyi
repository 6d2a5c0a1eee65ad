from .door import score as score
from .intervening import intervene as intervene
from .scorer import Scorer as Scorer
from .stage import score_rollouts as score_rollouts
from .tracking import track as track
