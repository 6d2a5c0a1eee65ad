from .evaluation import evaluate_model as evaluate_model
from .options import TrainingOptions as TrainingOptions
from .trainer import Trainer as Trainer
