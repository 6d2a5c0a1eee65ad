"""Which measurement of gradients numbers come from: one owner of that choice.

A gradient table may hold several measurements of the same tokens: other losses, parameter scopes,
methods, numbers of probes, seeds. Every reader (report, notebooks, the rule `gradient_oracle`,
`join_gradients`) asks `choose_measurement`, so that all of them show the same numbers. Where
several fit, it takes the one that the run prefers, and without such a record it refuses.

A run prefers the measurement that it was given first, so that a later one changes no number that
was there; `tip-analysis gradients RUN … --prefer` records another, and `--measurement` names one
for a single report or selection.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

import polars as pl

from tip_analysis.core.contract_checks import require_columns
from tip_analysis.core.errors import OptionError, RunError, SchemaError, UnknownNameError
from tip_analysis.core.names import Loss, Method, set_names
from tip_analysis.core.run_folder import Run, config_hash

GRADIENT_COLUMNS = (
    "grad_norm_sq",
    "grad_norm_sq_se",
    "grad_dot_loss",
    "grad_dot_loss_plugin",
    "reward_alignment",
    "num_probes",
)
"""What `join_gradients` adds to a token, where the gradient table has it."""


@dataclass(frozen=True)
class Preference:
    """Which measurement is meant where there are several; None leaves a field open."""

    param_scope: str | None = None
    """all, body, head, last:N or lora."""
    method: Method | str | None = None
    """probe or exact."""
    num_probes: int | None = None
    """K; 0 for exact."""
    seed: int | None = None
    """Of the probes."""

    def __post_init__(self) -> None:
        set_names(self, method=Method)

    @classmethod
    def parse(cls, pairs: Iterable[str]) -> Self:
        """From texts such as `param_scope=head`, `method=exact`.

        Raises:
            OptionError: a text is no pair, or a value is no number where one is needed.
            UnknownNameError: there is no such field, or no such method.
        """
        chosen: dict[str, Any] = {}
        for pair in pairs:
            name, equals, value = pair.partition("=")
            if not equals or not value:
                raise OptionError(
                    f"a measurement is named by KEY=VALUE pairs such as param_scope=all; found"
                    f" {pair!r}"
                )
            chosen[name] = _field_value(name, value)
        return cls(**chosen)

    @property
    def given(self) -> dict[str, Any]:
        """The fields that are not open."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def __str__(self) -> str:
        return " ".join(f"{name}={value}" for name, value in self.given.items())


@dataclass(frozen=True)
class Measurement:
    """One measurement of per-token gradients: what tells its rows from others in a gradient
    table."""

    loss: Loss | str
    """The per-token loss."""
    param_scope: str
    """Parameters that θ stands for: all, body, head, last:N, lora."""
    method: Method | str
    """probe or exact."""
    num_probes: int
    """K; 0 for exact."""
    seed: int
    """Of the probes and of the two folds of prompts."""

    def __post_init__(self) -> None:
        set_names(self, loss=Loss, method=Method)

    @property
    def setting(self) -> Preference:
        """All but the loss, as a user names it."""
        return Preference(self.param_scope, self.method, self.num_probes, self.seed)

    def fits(self, wanted: Preference) -> bool:
        """Whether it has every field that `wanted` gives."""
        return all(getattr(self, name) == value for name, value in wanted.given.items())

    def setting_words(self) -> str:
        """For captions: `all parameters, 32 probes, seed 0`."""
        how = "exact" if self.method == Method.EXACT else f"{self.num_probes} probes"
        return f"{_scope_words(self.param_scope)}, {how}, seed {self.seed}"

    def words(self) -> str:
        """`reverse_kl over all parameters, 32 probes, seed 0`."""
        return f"{self.loss} over {self.setting_words()}"

    def rows(self, gradients: pl.LazyFrame) -> pl.LazyFrame:
        """Its rows of a gradient table."""
        return gradients.filter(
            pl.col(name).cast(pl.String) == str(value) for name, value in asdict(self).items()
        )


MEASUREMENT_KEYS = tuple(field.name for field in fields(Measurement))
"""Columns that tell one measurement from another."""


def measurements_in(gradients: pl.LazyFrame) -> list[Measurement]:
    """The measurements that a gradient table holds: reverse KL first, then by their fields."""
    found = (
        gradients.select(MEASUREMENT_KEYS)
        .unique()
        .with_columns(pl.col("loss", "method").cast(pl.String))
        .collect(engine="streaming")
        .sort(MEASUREMENT_KEYS)
    )
    listed = [Measurement(**row) for row in found.iter_rows(named=True)]
    return sorted(listed, key=lambda one: list(Loss).index(Loss(one.loss)))


def choose_measurement(
    found: Sequence[Measurement],
    *,
    loss: Loss | str = Loss.REVERSE_KL,
    wanted: Preference | None = None,
    preferred: Preference | None = None,
) -> Measurement:
    """The measurement that numbers of a loss come from.

    Args:
        found: those that there are.
        loss: whose gradients.
        wanted: what the user asks for: it must be there.
        preferred: what the run has on record; settles which of several that fit.

    Raises:
        SchemaError: none fits.
        OptionError: several fit and none of them is preferred; the message lists them and says how
            to choose.
    """
    wanted = wanted or Preference()
    fitting = [one for one in found if one.loss == loss and one.fits(wanted)]
    if not fitting:
        asked = f"loss={loss} {wanted}".strip()
        raise SchemaError(
            f"no gradients with {asked}; measured are {_listed(found) or 'none'}: name one of"
            " these, or measure with `tip-analysis gradients`"
        )
    if len(fitting) > 1 and preferred is not None:
        fitting = [one for one in fitting if one.fits(preferred)] or fitting
    if len(fitting) > 1:
        raise OptionError(
            f"{len(fitting)} measurements of gradients fit, and the run prefers none of them:"
            f" {_listed(fitting)}. Name one, as in --measurement {fitting[0].setting} (in Python,"
            " these fields are arguments), or record it for the run with `tip-analysis gradients"
            " RUN … --prefer`"
        )
    return fitting[0]


def preferred_measurement(run: Run) -> Preference | None:
    """What `run.json` has on record, if anything."""
    recorded = run.record().get("preferences", {}).get("measurement")
    return None if recorded is None else Preference(**recorded)


def prefer_measurement(run: Run, preference: Preference) -> None:
    """Record which measurement the numbers of a run come from, where there are several.

    Raises:
        OptionError: a field is left open, so that it might not settle the choice.
    """
    missing = [name for name, value in asdict(preference).items() if value is None]
    if missing:
        raise OptionError(f"a run prefers one measurement: {', '.join(missing)} must be given too")
    run.update(
        lambda record: record.setdefault("preferences", {}).update(measurement=asdict(preference))
    )


def settle_preference(run: Run, measured: Preference) -> None:
    """Before `measured` is added to a run: record what it prefers, if nothing valid is on record.

    That is the one setting that it holds already, else `measured`. Where it holds several and
    prefers none of them, nothing is recorded: readers go on asking.
    """
    found = measurements_in(run.gradients()) if run.has("gradients") else []
    recorded = preferred_measurement(run)
    if recorded is not None and any(one.fits(recorded) for one in found):
        return
    settings = list(dict.fromkeys(one.setting for one in found)) or [measured]
    if len(settings) == 1:
        prefer_measurement(run, settings[0])


def run_measurement(
    run: Run, *, loss: Loss | str = Loss.REVERSE_KL, wanted: Preference | None = None
) -> Measurement:
    """`choose_measurement` among those of a run, under what it prefers.

    Raises:
        RunError: no gradients were measured.
        SchemaError, OptionError: none fits, or several do.
    """
    if not run.has("gradients"):
        raise RunError(
            f"{run.path} has no gradients yet; `tip-analysis gradients {run.path}` measures them"
        )
    return choose_measurement(
        measurements_in(run.gradients()),
        loss=loss,
        wanted=wanted,
        preferred=preferred_measurement(run),
    )


def measurement_hash(run: Run, measurement: Measurement) -> str:
    """One hash of the shards of a measurement: it stays when others are added. Of all gradients,
    where the record does not tell them apart."""
    key = asdict(measurement)
    shards = {
        name: shard["sha256"]
        for stage in run.stages().values()
        if stage["table"] == "gradients" and key.items() <= _scalars(stage["config"]).items()
        for name, shard in stage["shards"].items()
    }
    return config_hash(shards) if shards else run.table_hash("gradients")


def join_gradients(
    tokens: pl.LazyFrame | pl.DataFrame,
    gradients: Run | pl.LazyFrame | pl.DataFrame,
    *,
    loss: Loss | str = Loss.REVERSE_KL,
    param_scope: str | None = None,
    method: Method | str | None = None,
    num_probes: int | None = None,
    seed: int | None = None,
) -> pl.LazyFrame:
    """The tokens whose gradients were measured, with the columns of one measurement.

    Args:
        tokens: Token table.
        gradients: Gradient table, which may hold any number of measurements, or the run that has
            it: a run also says which it prefers.
        loss: Which per-token loss.
        param_scope, method, num_probes, seed: Which measurement, where there are several.

    Returns:
        Inner join on (rollout_id, position), rows in the order of `tokens`.

    Raises:
        RunError: the run has no gradients.
        SchemaError: no measurement fits, or a column is missing.
        OptionError: more than one fits and none is preferred; the message lists them.
    """
    wanted = Preference(param_scope, method, num_probes, seed)
    if isinstance(gradients, Run):
        chosen = run_measurement(gradients, loss=loss, wanted=wanted)
        return with_gradients(tokens, gradients.gradients(), chosen)
    gradients = gradients.lazy()
    keys = ["rollout_id", "position", *MEASUREMENT_KEYS]
    require_columns(gradients, [*keys, "grad_norm_sq", "grad_dot_loss"], "join_gradients")
    chosen = choose_measurement(measurements_in(gradients), loss=loss, wanted=wanted)
    return with_gradients(tokens, gradients, chosen)


def with_gradients(
    tokens: pl.LazyFrame | pl.DataFrame, gradients: pl.LazyFrame, measurement: Measurement
) -> pl.LazyFrame:
    """Inner join of tokens with the rows of one measurement, in the order of `tokens`."""
    present = gradients.collect_schema().names()
    columns = [name for name in GRADIENT_COLUMNS if name in present]
    narrow = measurement.rows(gradients).select("rollout_id", "position", *columns)
    return tokens.lazy().join(
        narrow, on=["rollout_id", "position"], how="inner", maintain_order="left"
    )


def _field_value(name: str, value: str) -> str | int:
    names = [field.name for field in fields(Preference)]
    if name not in names:
        raise UnknownNameError("field of a measurement", name, names)
    if name == "method":
        return Method(value)
    if name == "param_scope":
        return value
    if not value.lstrip("-").isdigit():
        raise OptionError(f"{name} of a measurement is a whole number; found {value!r}")
    return int(value)


def _scope_words(scope: str) -> str:
    if scope.startswith("last:"):
        return f"the last {scope.removeprefix('last:')} layers"
    return {"all": "all parameters", "lora": "the LoRA parameters"}.get(scope, f"the {scope}")


def _listed(found: Sequence[Measurement]) -> str:
    return "; ".join(f"loss={one.loss} {one.setting}" for one in found)


def _scalars(config: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if isinstance(value, str | int)}
