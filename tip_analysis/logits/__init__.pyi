from .losses import entropy as entropy
from .losses import forward_kl as forward_kl
from .losses import jsd as jsd
from .losses import negative_logprob as negative_logprob
from .losses import reverse_kl as reverse_kl
from .row_statistics import token_statistics as token_statistics
