from .measuring import measure_gradients as measure_gradients
from .measuring import model_pair as model_pair
from .measuring import norm_interval as norm_interval
from .measuring import token_gradients as token_gradients
from .rollout_gradients import GradientSettings as GradientSettings
from .rollout_gradients import TokenGradients as TokenGradients
from .rollout_gradients import stratified_positions as stratified_positions
from .stage import measure_run as measure_run
