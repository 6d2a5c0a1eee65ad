"""A teacher behind an OpenAI-compatible server: its side of every counted token, from the
log-probabilities of a prompt.

Each rollout goes out once as token ids, prompt and response together, with `prompt_logprobs=k`. Of
every response token the server tells the k most likely tokens and the sampled one, which is always
kept: outside the top k is where the student is most overconfident. Divergences take all other
tokens as one (`top_k_side`); the teacher's entropy is not known, and null.

The teacher must share the student's vocabulary, which its own tokenizer would say; here the text
of the tokens that the server answers with is compared with the student's.

Rounding: log-probabilities are float32 and sum to 1 within about 1e-6. A tail below `TAIL_FLOOR`
cannot be told from none, and counts as that.
"""

import logging
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import Any

import polars as pl
import torch

from tip_analysis.core.errors import EngineError, OptionError, VocabularyMismatchError
from tip_analysis.logits.blocks import Columns
from tip_analysis.models.loading import LanguageModel
from tip_analysis.models.locating import SERVED
from tip_analysis.models.unloaded import UnloadedModel
from tip_analysis.rollouts.encoded import Rollout, rollouts_in_memory
from tip_analysis.rollouts.engines.completions import CompletionsClient, in_parallel
from tip_analysis.rollouts.engines.engine import LOGPROB_ROUNDING
from tip_analysis.scoring.scorer import Scorer
from tip_analysis.scoring.top_k_side import TopKSide, marks_of

logger = logging.getLogger(__name__)

TAIL_FLOOR = 1e-6
"""The smallest probability of all tokens that the server does not name."""
IMPOSSIBLE_BELOW = -9000.0
"""vLLM writes -9999 for a log-probability of -inf."""
OWN = ("teacher_topk_ids", "teacher_topk_logprobs", "teacher_top1_prob", "teacher_logprob")
"""Columns that the server tells."""


@dataclass(frozen=True)
class Row:
    """What is known of one position: tokens by falling probability, and the sampled one's."""

    ids: list[int]
    logprobs: list[float]
    sampled: float
    """ln P of the sampled token, which is one of them."""


class ServedTeacher:
    """The teacher's side of a run, asked for shard by shard."""

    def __init__(self, client: CompletionsClient, student: LanguageModel, k: int) -> None:
        """Find out how much the server tells.

        Args:
            client: connected.
            student: whose vocabulary the teacher shares, and whose chat template it is shown.
            k: tokens to ask for; fewer where the server allows fewer.

        Raises:
            EngineError: the server gives no log-probabilities of a prompt.
        """
        self.client = client
        self.k = _allowed(client, k, sorted(student.stop_token_ids)[0])
        name = f"{SERVED}{client.model}"
        self.model = UnloadedModel(
            name,
            student.tokenizer,
            student.vocab_size,
            None if client.max_model_len is None else client.max_model_len - 1,
            student.stop_token_ids,
            {"name": name, "teacher_k": self.k},
        )
        self._checked: set[int] = set()

    @property
    def teacher(self) -> dict[str, Any]:
        """What the record says of the teacher."""
        return self.model.describe()

    def facts(self) -> dict[str, Any]:
        """Where the server is."""
        return {"teacher_server": self.client.address}

    def marks(self) -> dict[str, Any]:
        """What the record says of columns that are not exact."""
        return marks_of(OWN)

    def check(self, scorer: Scorer) -> None:
        """Refuse to fill more top tokens than the server tells.

        Raises:
            OptionError: `--top-k` is larger.
        """
        if scorer.top_k > self.k:
            raise OptionError(
                f"--top-k {scorer.top_k} is more than the {self.k} tokens that the teacher's server"
                " tells: lower it, or start the server with a larger --max-logprobs"
            )

    def shard(self, index: int, rollouts: pl.DataFrame, scorer: Scorer) -> "ServedShard":
        """The side of one shard's rollouts.

        Raises:
            EngineError: the server fails for good, or answers what was not asked for.
            VocabularyMismatchError: its tokens are not the student's.
        """
        counted = [rollout for rollout in rollouts_in_memory(rollouts) if rollout.num_tokens]
        told = in_parallel(
            range(len(counted)), lambda place: self._rows(counted[place], scorer), self.client
        )
        found = dict(told)
        rows = [found[place] for place in range(len(counted))]
        names = [rollout.rollout_id for rollout in counted]
        return ServedShard(names, rows, _columns(list(chain.from_iterable(rows)), scorer.top_k))

    def _rows(self, rollout: Rollout, scorer: Scorer) -> list[Row]:
        """One row for each token of a rollout that the student wrote."""
        prompt = list(rollout.prompt_of(teacher=True))
        told = _prompt_logprobs(
            self.client, [*prompt, *rollout.response], self.k, rollout.rollout_id
        )
        rows = []
        for place in rollout.positions:
            entry = told[len(prompt) + place]
            where = f"rollout {rollout.rollout_id!r}, position {place}"
            self._check_texts(entry, scorer, where)
            row = _row(entry, rollout.response[place], scorer.vocab_size, where)
            if len(row.ids) < scorer.top_k:
                raise EngineError(
                    f"{where}: {self.client.address} names {len(row.ids)} tokens that the student"
                    f" has; --top-k {scorer.top_k} needs as many"
                )
            rows.append(row)
        return rows

    def _check_texts(self, entry: Mapping[str, Any], scorer: Scorer, where: str) -> None:
        """Refuse a server whose tokens have other texts than the student's."""
        told = {int(name): one.get("decoded_token") for name, one in entry.items()}
        texts = {token_id: text for token_id, text in told.items() if isinstance(text, str)}
        new = {one for one in texts.keys() - self._checked if one < scorer.vocab_size}
        for token_id in new:
            ours = str(scorer.student.tokenizer.decode([token_id])).strip()
            theirs = texts[token_id].strip()
            if _PLAIN.fullmatch(ours) and _PLAIN.fullmatch(theirs) and ours != theirs:
                raise VocabularyMismatchError(
                    f"{where}: token {token_id} is {ours!r} for the student and {theirs!r} for the"
                    f" teacher at {self.client.address}: they do not share a vocabulary"
                )
        self._checked |= new


FEWER = (20, 5, 1)
"""What is asked for where a server refuses more and does not say how many it allows."""
_PLAIN = re.compile(r"[A-Za-z0-9]+")
"""Texts that every tokenizer's decoding leaves as they are."""


@dataclass(frozen=True)
class ServedShard:
    """The teacher's side of some rollouts, as its server told it."""

    rollout_ids: Sequence[str]
    rows: Sequence[Sequence[Row]]
    columns: Columns

    def side(self, rollout_ids: Sequence[str]) -> TopKSide:
        """Of the counted tokens of these rollouts, one after another."""
        ends = list(accumulate(len(part) for part in self.rows))
        place = {
            name: torch.arange(end - len(part), end)
            for name, end, part in zip(self.rollout_ids, ends, self.rows, strict=True)
        }
        wanted = torch.cat([place[name] for name in rollout_ids])
        return TopKSide({name: column[wanted] for name, column in self.columns.items()}, OWN)


def _columns(rows: Sequence[Row], top_k: int) -> Columns:
    """Rows as tensors; where fewer tokens are known than elsewhere, the first stands again."""
    width = max((len(row.ids) for row in rows), default=top_k)

    def filled(values: list[Any]) -> list[Any]:
        return values + values[:1] * (width - len(values))

    ids = torch.tensor([filled(row.ids) for row in rows], dtype=torch.int32).reshape(-1, width)
    logprobs = torch.tensor([filled(row.logprobs) for row in rows]).reshape(-1, width)
    return {
        "teacher_topk_ids": ids[:, :top_k],
        "teacher_topk_logprobs": logprobs[:, :top_k],
        "teacher_top1_prob": logprobs[:, 0].exp(),
        "teacher_logprob": torch.tensor([row.sampled for row in rows]),
        "known_ids": ids,
        "known_logprobs": logprobs,
        "log_tail_mass": torch.tensor([_log_tail(row.logprobs) for row in rows]),
    }


def _log_tail(logprobs: Sequence[float]) -> float:
    """ln of the mass of all tokens that are not named."""
    return math.log(max(TAIL_FLOOR, 1.0 - math.fsum(map(math.exp, logprobs))))


def _row(entry: Mapping[str, Any], sampled: int, vocab_size: int, where: str) -> Row:
    """One position as the server tells it; rows beyond the shared vocabulary are left out."""
    if str(sampled) not in entry:
        raise EngineError(f"{where}: the server does not tell the sampled token's log-probability")
    found = {int(name): _logprob(one["logprob"], where) for name, one in entry.items()}
    shared = sorted((-value, token) for token, value in found.items() if 0 <= token < vocab_size)
    return Row([token for _, token in shared], [-value for value, _ in shared], found[sampled])


def _logprob(value: float, where: str) -> float:
    if not value <= LOGPROB_ROUNDING:
        raise EngineError(f"{where}: the server tells {value!r}, which is no log-probability")
    return -math.inf if value < IMPOSSIBLE_BELOW else min(0.0, float(value))


def _prompt_logprobs(
    client: CompletionsClient, sequence: Sequence[int], k: int, name: str
) -> list[Mapping[str, Any]]:
    """For each token of a sequence but the first, what the model says of its place.

    Raises:
        EngineError: the server gives none, or of another sequence.
    """

    def read(choice: Mapping[str, Any]) -> list[Mapping[str, Any]]:
        told, shown = choice.get("prompt_logprobs"), choice.get("prompt_token_ids")
        if told is None:
            raise EngineError(
                f"{client.address} gives no log-probabilities of a prompt (prompt_logprobs): a"
                " teacher needs a server that does, such as `vllm serve`"
            )
        if len(told) != len(sequence) or (shown is not None and list(shown) != list(sequence)):
            raise EngineError(
                f"{client.address} read another sequence than it was given for {name!r}"
                f" ({len(told)} of {len(sequence)} tokens): it must take token ids as they are"
            )
        if not all(isinstance(entry, dict) and entry for entry in told[1:]):
            raise EngineError(f"{client.address} leaves out places of the sequence {name!r}")
        return told

    payload = {
        "prompt": list(sequence),
        "max_tokens": 1,
        "temperature": 0.0,
        "prompt_logprobs": k,
        "return_token_ids": True,
        "add_special_tokens": False,
    }
    return client.complete(payload, read)


def _allowed(client: CompletionsClient, k: int, token: int) -> int:
    """How many tokens the server tells of each place, at most `k`."""
    while True:
        try:
            told = _prompt_logprobs(client, [token, token], k, "a question of two tokens")
        except EngineError as error:
            limit = re.search(r"max allowed: (\d+)", str(error))
            fewer = int(limit[1]) if limit else max((n for n in FEWER if n < k), default=0)
            if "logprobs" not in str(error) or not 0 < fewer < k:
                raise
            logger.warning("%s tells at most %d tokens of each place", client.address, fewer)
            k = fewer
            continue
        return min(k, len(told[1]))
