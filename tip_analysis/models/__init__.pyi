from .batching import TokenBudget as TokenBudget
from .loading import LanguageModel as LanguageModel
from .loading import load_model as load_model
from .loading import load_tokenizer as load_tokenizer
from .named import as_model as as_model
