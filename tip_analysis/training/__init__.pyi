from .ablation.presets import PRESETS as PRESETS
from .ablation.presets import experiment as experiment
from .door import ablate as ablate
from .door import evaluate as evaluate
from .evaluation import evaluate_model as evaluate_model
from .options import TrainingOptions as TrainingOptions
from .step_metrics import log_step as log_step
from .trainer import Trainer as Trainer
