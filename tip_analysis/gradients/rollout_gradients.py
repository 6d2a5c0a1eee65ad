"""One rollout at a time: squared norms of its tokens' gradients, and their products with ∇L and ∇J.

The student's primal pass and the teacher's logits are made once a rollout. Then every direction
(stored gradients for φ_t and `reward_alignment`, Gaussian ones for M_t) is one row of a
forward-mode pass, for all tokens and all losses.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import psutil
import torch
from torch import Tensor

from tip_analysis.core.errors import ModelError
from tip_analysis.core.names import Loss, Method
from tip_analysis.core.text import first_line
from tip_analysis.gradients.directions import (
    Direction,
    GaussianDirection,
    gaussian_directions,
    in_groups,
    stable_hash,
)
from tip_analysis.gradients.forward_mode import ForwardMode
from tip_analysis.gradients.loss_gradients import (
    REWARD,
    LossDirections,
    Pair,
    inner_product,
    trainable,
    weighted_gradient,
)
from tip_analysis.gradients.scopes import ParameterScope
from tip_analysis.gradients.settings import GradientSettings
from tip_analysis.gradients.token_losses import TokenLosses, token_losses
from tip_analysis.models.batching import is_out_of_memory
from tip_analysis.models.hidden_states import last_hidden_states, read_tokens
from tip_analysis.rollouts.encoded import Rollout

BATCHED_BYTES = 1 << 28
"""Gradients that an exact pass holds at once, at most, where one token's are smaller."""
ROWS_TIMES_TOKENS = {"cpu": 1024, "cuda": 16384}
"""Probes × tokens in a pass beyond which a larger batch gains nothing."""
FORWARD_MODE_TOLERANCE = {
    torch.bfloat16: 0.3,
    torch.float16: 0.1,
    torch.float32: 1e-2,
    torch.float64: 1e-4,
}
"""How far forward and backward mode may be apart, relative to the gradient's norm; a parameter
forgotten shows as its share."""


@dataclass(frozen=True)
class TokenGradients:
    """One loss at R tokens of a rollout; None where there is nothing to compare with."""

    positions: list[int]
    """In the response, [R]."""
    grad_norm_sq: Tensor
    """M_t or its estimate, [R], as all that follow float64."""
    grad_norm_sq_se: Tensor
    grad_dot_loss: Tensor | None
    grad_dot_loss_plugin: Tensor
    reward_alignment: Tensor | None


class RolloutMeter:
    """Measures rollouts with one set-up of the student; a context manager."""

    def __init__(
        self,
        pair: Pair,
        scope: ParameterScope,
        settings: GradientSettings,
        directions: LossDirections,
    ) -> None:
        self.pair = pair
        self.scope = scope
        self.settings = settings
        self.directions = directions
        self.num_infinite = 0
        """Tokens left out so far because their loss is infinite."""
        self.by_backward = False
        """Whether products with ∇L and ∇J come from backward passes: with `exact`, where forward
        mode does not see all parameters."""
        self._forward = ForwardMode(pair.student.model, scope)
        self._verified = not scope.body

    def __enter__(self) -> "RolloutMeter":
        self._forward.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._forward.__exit__(*exception)

    def measure(self, rollout: Rollout) -> dict[str, TokenGradients]:
        """Every loss at the tokens of one rollout that count; tokens of infinite loss are left out.

        Raises:
            ModelError: forward mode does not see all parameters of the scope.
        """
        positions = self._positions(rollout)
        if not positions:
            return {}
        stored = {
            Loss(loss): self._stored(loss, rollout.prompt_id) for loss in self.settings.losses
        }
        losses, tokens, at = self._losses(rollout, positions, stored)
        if self.by_backward:
            products = self._products_by_backward(losses, stored, tokens, at)
        else:
            products = self._products(losses, stored, len(tokens), at)
        if self.settings.method is Method.EXACT:
            norms = {
                loss: (value, torch.zeros_like(value))
                for loss, value in self._exact(losses, tokens, at).items()
            }
        else:
            norms = self._probed(losses, rollout.rollout_id, tokens, at)
        return {
            loss: self._result(rollout, positions, losses[loss], norms[loss], products[loss])
            for loss in losses
        }

    def along(
        self, rollout: Rollout, stored: Mapping[Loss, Mapping[str, Direction]]
    ) -> tuple[list[int], dict[Loss, dict[str, Tensor]]]:
        """⟨direction, g_t⟩ of every token that counts, for each loss and each of its directions.

        Args:
            rollout: the rollout.
            stored: of each loss, the directions by name.

        Returns:
            Positions [R] in the response, and float64 [R] for each; NaN where the loss is infinite.

        Raises:
            ModelError: forward mode does not see all parameters of the scope.
        """
        positions = rollout.positions
        if not positions:
            return [], {}
        losses, tokens, at = self._losses(rollout, positions, stored)
        products = self._products(losses, stored, len(tokens), at)
        unknown = {loss: ~found.value.isfinite() for loss, found in losses.items()}
        return positions, {
            loss: {
                name: value.masked_fill(unknown[loss], math.nan) for name, value in named.items()
            }
            for loss, named in products.items()
        }

    def _losses(
        self, rollout: Rollout, positions: list[int], stored: Mapping[Loss, Mapping[str, Direction]]
    ) -> tuple[dict[Loss, TokenLosses], Tensor, Tensor]:
        """The primal pass: losses with their derivatives, token ids [T], places [R] that predict
        the tokens."""
        tokens, at = read_tokens(
            rollout.prompt, rollout.response, positions, self.pair.student.device
        )
        hidden = self._forward.primal(tokens)[at]
        losses = token_losses(
            self.pair.student.head,
            hidden,
            teacher=self.pair.teacher_logits(rollout, positions),
            token_ids=torch.tensor([rollout.response[t] for t in positions], device=tokens.device),
            losses=list(stored),
            scope=self.scope,
            looked_up=torch.unique(tokens),
            directions={loss: list(named.values()) for loss, named in stored.items()},
            vocab_size=self.pair.vocab_size,
        )
        if not self._verified:
            self._verify(rollout, positions, losses, tokens, at)
        return losses, tokens, at

    def _products_by_backward(
        self,
        losses: dict[Loss, TokenLosses],
        stored: Mapping[Loss, Mapping[str, Direction]],
        tokens: Tensor,
        at: Tensor,
    ) -> dict[Loss, dict[str, Tensor]]:
        """As `_products`, by one backward pass a token."""
        student, body = self.pair.student, self.scope.body
        products: dict[Loss, dict[str, Tensor]] = {}
        with trainable(student.model, self.scope):
            hidden = last_hidden_states(student.model, tokens[None])
            for loss, found in losses.items():
                named = stored[loss]
                sums = found.along_head[: len(named)].clone()
                for row, place in enumerate(at.tolist()):
                    cotangent = torch.zeros_like(hidden)
                    cotangent[0, place] = found.hidden_gradient[row].to(hidden.dtype)
                    gradients = torch.autograd.grad(
                        hidden, list(body.values()), cotangent, retain_graph=True, allow_unused=True
                    )
                    known = {
                        name: gradient
                        for name, gradient in zip(body, gradients, strict=True)
                        if gradient is not None
                    }
                    for index, direction in enumerate(named.values()):
                        sums[index, row] += inner_product(known, direction, self.scope, {})
                products[loss] = {
                    name: sums[index] * direction.scale
                    for index, (name, direction) in enumerate(named.items())
                }
        return products

    def _positions(self, rollout: Rollout) -> list[int]:
        positions, wanted = rollout.positions, self.settings.tokens_per_rollout
        if wanted is None or wanted >= len(positions):
            return positions
        chosen = stratified_positions(
            len(positions), wanted, seed=self.settings.seed, rollout_id=rollout.rollout_id
        )
        return [positions[index] for index in chosen]

    def _stored(self, loss: Loss | str, prompt_id: str) -> dict[str, Direction]:
        """The stored gradients that a token of this loss is compared with."""
        candidates = {
            "other": self.directions.of(loss, prompt_id),
            "own": self.directions.of(loss, prompt_id, own=True),
            REWARD: self.directions.of(REWARD, prompt_id),
        }
        return {name: direction for name, direction in candidates.items() if direction is not None}

    def _tangents(self, directions: Sequence[Direction], at: Tensor) -> Tensor:
        """Tangents [c, R, D] of the hidden states that predict the tokens."""
        return self._forward.tangents(directions)[:, at]

    def _products(
        self,
        losses: dict[Loss, TokenLosses],
        stored: Mapping[Loss, Mapping[str, Direction]],
        num_tokens: int,
        at: Tensor,
    ) -> dict[Loss, dict[str, Tensor]]:
        """⟨∇L, g_t⟩ for ∇L from the other and from the own fold, and ⟨∇J, g_t⟩: float64 [R]
        each."""
        tangents: dict[int, Tensor] = {}
        if self.scope.body:
            unique = list(
                {id(d): d for named in stored.values() for d in named.values()}.values()
            )  # ∇J serves all losses
            for start, group in in_groups(unique, self._together(num_tokens)):
                tangents |= {
                    id(unique[start + row]): t for row, t in enumerate(self._tangents(group, at))
                }
        products: dict[Loss, dict[str, Tensor]] = {}
        for loss, found in losses.items():
            products[loss] = {}
            for index, (name, direction) in enumerate(stored[loss].items()):
                product = found.along_head[index].clone()
                if self.scope.body:
                    product += found.derivative(tangents[id(direction)], None)
                products[loss][name] = product * direction.scale
        return products

    def _probed(
        self, losses: dict[Loss, TokenLosses], rollout_id: str, tokens: Tensor, at: Tensor
    ) -> dict[Loss, tuple[Tensor, Tensor]]:
        """M̂_t = closed form + (1/K) Σ_k ⟨v_k, g_t⟩² and its standard error √(2/K) of the second
        term."""
        count = self.settings.num_probes
        sums = {loss: torch.zeros_like(found.closed_form) for loss, found in losses.items()}
        if self.scope.body:
            weight: Any = self.pair.student.head.linear.weight
            looked_up = torch.unique(tokens)
            probes = gaussian_directions(self.settings.seed, rollout_id, count)
            name: Any = self.scope.head_weight
            for _, group in in_groups(probes, self._together(len(tokens))):
                for probe, tangent in zip(group, self._tangents(group, at), strict=True):
                    shared = None
                    if self.scope.tied:
                        shared = probe.rows(name, weight, looked_up)
                    for loss, found in losses.items():
                        sums[loss] += found.derivative(tangent, shared).square()
        return {
            loss: (found.closed_form + sums[loss] / count, sums[loss] / count * (2 / count) ** 0.5)
            for loss, found in losses.items()
        }

    def _together(self, num_tokens: int) -> int:
        """How many directions to evaluate as one batch: a row costs its activations in one block,
        and the largest weight."""
        if self.settings.probes_together is not None:
            return self.settings.probes_together
        device = self.pair.student.device
        free = (
            torch.cuda.mem_get_info(device)[0]
            if device.type == "cuda"
            else psutil.virtual_memory().available
        )
        config = self.pair.student.model.config.get_text_config()
        widest = max(getattr(config, "intermediate_size", None) or 0, 4 * config.hidden_size)
        largest = max(parameter.numel() for parameter in self.scope.body.values())
        row_bytes = (16 * num_tokens * widest + largest) * self.pair.student.dtype.itemsize
        useful = ROWS_TIMES_TOKENS.get(device.type, 2048) // max(1, num_tokens)
        return max(1, min(32, useful, int(free // 4 // row_bytes)))

    def _exact(
        self, losses: dict[Loss, TokenLosses], tokens: Tensor, at: Tensor
    ) -> dict[Loss, Tensor]:
        """‖g_t‖² by backward passes from the hidden states, several tokens at once where their
        gradients are small."""
        totals = {loss: found.closed_form.clone() for loss, found in losses.items()}
        if not self.scope.body:
            return totals
        looked_up = torch.unique(tokens)
        together = max(1, min(32, BATCHED_BYTES // self.scope.num_bytes))
        with trainable(self.pair.student.model, self.scope):
            hidden = last_hidden_states(self.pair.student.model, tokens[None])
            for loss, found in losses.items():
                for start in range(0, len(at), together):
                    rows = slice(start, min(start + together, len(at)))
                    cotangents = hidden.new_zeros(rows.stop - start, *hidden.shape)
                    cotangents[torch.arange(rows.stop - start), 0, at[rows]] = (
                        found.hidden_gradient[rows].to(hidden.dtype)
                    )
                    totals[loss][rows] += self._squared_norms(
                        hidden, cotangents, found, rows, looked_up
                    )
        return totals

    def _squared_norms(
        self, hidden: Tensor, cotangents: Tensor, found: TokenLosses, rows: slice, looked_up: Tensor
    ) -> Tensor:
        """‖Σ cotangent · ∂hidden/∂θ‖² [n] over the body's parameters, a tied weight with its use in
        the head."""
        names, parameters = list(self.scope.body), list(self.scope.body.values())
        if len(cotangents) == 1:
            single = torch.autograd.grad(
                hidden, parameters, cotangents[0], retain_graph=True, allow_unused=True
            )
            gradients = [None if gradient is None else gradient[None] for gradient in single]
        else:
            gradients = torch.autograd.grad(
                hidden,
                parameters,
                cotangents,
                retain_graph=True,
                allow_unused=True,
                is_grads_batched=True,
            )
        total = cotangents.new_zeros(len(cotangents), dtype=torch.float64)
        for name, own in zip(names, gradients, strict=True):
            gradient = own
            if name == self.scope.head_weight and found.shared_rows is not None:
                both = found.shared_rows[rows][:, :, None] * found.hidden[rows][:, None, :]
                gradient = both if own is None else both + own[:, looked_up]
            if gradient is not None:
                norm = torch.linalg.vector_norm(
                    gradient.flatten(1),
                    dim=1,
                    dtype=torch.promote_types(gradient.dtype, torch.float32),
                )
                total += norm.double().square()
        return total

    def _verify(
        self,
        rollout: Rollout,
        positions: list[int],
        losses: dict[Loss, TokenLosses],
        tokens: Tensor,
        at: Tensor,
    ) -> None:
        """Find the way in which forward mode agrees with backward mode, once: layer by layer, or
        with all parameters at once.

        Raises:
            ModelError: there is none, and the method needs one.
        """
        problem = ""
        for whole in (False, True):
            self._forward.whole = whole
            try:
                problem = self._disagreement(rollout, positions, losses, tokens, at)
            except (NotImplementedError, RuntimeError, TypeError) as error:
                if is_out_of_memory(error):
                    raise
                problem = f"{type(self.pair.student.model).__name__}: {first_line(error)}"
            if problem is None:
                self._verified = True
                return
        self._forward.whole = False
        if self.settings.method is not Method.EXACT:
            raise ModelError(f"{problem}; choose another --params, or --method exact")
        self.by_backward = self._verified = True

    def _disagreement(
        self,
        rollout: Rollout,
        positions: list[int],
        losses: dict[Loss, TokenLosses],
        tokens: Tensor,
        at: Tensor,
    ) -> str | None:
        """Compare Σ_t ⟨v, g_t⟩ by forward mode with ⟨v, ∇Σ_t ℓ_t⟩ by backward mode; None where
        they agree."""
        direction = GaussianDirection(self.settings.seed, "check of forward mode", 0)
        loss, found = next(iter(losses.items()))
        shared = None
        if self.scope.tied:
            weight, name = self.pair.student.head.linear.weight, self.scope.head_weight
            shared = direction.rows(name, weight, torch.unique(tokens))  # pyright: ignore
        finite = found.value.isfinite()
        forward = float(found.derivative(self._tangents([direction], at)[0], shared)[finite].sum())
        body = ParameterScope(
            self.scope.name,
            self.scope.body,
            self.scope.body,
            self.scope.head_weight if self.scope.tied else None,
            None,
        )
        counted = set(positions)
        part = replace(rollout, loss_mask=[t in counted for t in range(len(rollout.response))])
        gradient = weighted_gradient(self.pair, body, [part], [1.0], loss)
        backward = inner_product(gradient, direction, body, self._forward.looked_up)
        norm = float(sum(tensor.double().square().sum() for tensor in gradient.values()) ** 0.5)
        if abs(forward - backward) <= FORWARD_MODE_TOLERANCE[self.pair.student.dtype] * norm:
            return None
        return (
            f"forward mode and backward mode differ for {type(self.pair.student.model).__name__},"
            f" scope {self.scope.name!r}: {forward:.6g} against {backward:.6g}, gradient norm"
            f" {norm:.6g}"
        )

    def verify(self, rollout: Rollout) -> None:
        """Compare forward mode with backward mode on one rollout, before the work begins.

        Raises:
            ModelError: they differ, and the method needs forward mode.
        """
        positions = self._positions(rollout)
        if self._verified or not positions:
            return
        student = self.pair.student
        tokens, at = read_tokens(rollout.prompt, rollout.response, positions, student.device)
        hidden = self._forward.primal(tokens)[at]
        losses = token_losses(
            student.head,
            hidden,
            teacher=self.pair.teacher_logits(rollout, positions),
            token_ids=torch.tensor([rollout.response[t] for t in positions], device=tokens.device),
            losses=self.settings.losses[:1],
            scope=self.scope,
            looked_up=torch.unique(tokens),
            vocab_size=self.pair.vocab_size,
        )
        self._verify(rollout, positions, losses, tokens, at)

    def _result(
        self,
        rollout: Rollout,
        positions: list[int],
        found: TokenLosses,
        norms: tuple[Tensor, Tensor],
        products: dict[str, Tensor],
    ) -> TokenGradients:
        finite = found.value.isfinite()
        self.num_infinite += int((~finite).sum())
        fold = self.directions.folds[rollout.prompt_id]
        plugin = torch.zeros_like(norms[0])
        for name, index in (("own", fold), ("other", 1 - fold)):
            if name in products:
                plugin = plugin + self.directions.weights[index] * products[name]
        alignment = products.get(REWARD)
        other = products.get("other")
        return TokenGradients(
            positions=[t for t, keep in zip(positions, finite.tolist(), strict=True) if keep],
            grad_norm_sq=norms[0][finite],
            grad_norm_sq_se=norms[1][finite],
            grad_dot_loss=None if other is None else other[finite],
            grad_dot_loss_plugin=plugin[finite],
            reward_alignment=None if alignment is None else -alignment[finite],
        )


def stratified_positions(
    num_tokens: int, num_samples: int, *, seed: int, rollout_id: str
) -> list[int]:
    """`num_samples` of `num_tokens` positions, one from each of as many stretches of equal length,
    by a key alone."""
    edges = [index * num_tokens // num_samples for index in range(num_samples + 1)]
    return [
        start + stable_hash("token", seed, rollout_id, index) % (stop - start)
        for index, (start, stop) in enumerate(pairwise(edges))
        if stop > start
    ]
