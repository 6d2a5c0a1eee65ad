"""Run by TRL's Python: reads a batch as JSON from stdin, writes the weight that TRL's IW-OPD gives
each token, read off the gradient of its loss."""

import json
import sys
from collections import defaultdict
from types import SimpleNamespace

import torch
from trl.experimental.gkd import GKDTrainer
from trl.experimental.iw_opd.iw_opd_trainer import IWOPDTrainer

batch = json.load(sys.stdin)
tensor = {name: torch.tensor(batch[name], dtype=torch.float64) for name in ("student", "teacher")}
ids = torch.tensor(batch["token_ids"])
labels = torch.where(torch.tensor(batch["written"]), ids, -100)
student = tensor["student"].requires_grad_()
teacher = tensor["teacher"].log_softmax(-1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)
trainer = SimpleNamespace(
    temperature=1.0,
    iw_opd_gamma=0.5,
    iw_opd_epsilon=1e-8,
    model=SimpleNamespace(training=True),
    _metrics={"train": defaultdict(list)},
)
loss = IWOPDTrainer._compute_iw_opd_loss(trainer, student, ids, labels, teacher)
loss.backward()
log_p = student.detach().log_softmax(-1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)
at_token = student.grad.gather(-1, ids.unsqueeze(-1)).squeeze(-1)
num_tokens = (labels != -100).sum()
weights = -at_token * num_tokens / ((teacher - log_p) * (1 - log_p.exp()))
mixtures = {
    str(beta): float(
        GKDTrainer.generalized_jsd_loss(
            tensor["student"].detach(), tensor["teacher"], labels=labels, beta=beta
        )
    )
    for beta in (0.1, 0.5, 0.9)
}
json.dump({"weights": weights.tolist(), "jsd": mixtures}, sys.stdout)
