"""One choice of measurement: what is taken, what is refused, and what the run has on record."""

import polars as pl
import pytest
from synthetic import Tables, make_tables, make_three_measurements, write_measurement, write_run

from tip_analysis.analysis.masks import recorded_measurements, write_masks
from tip_analysis.analysis.measurements import (
    Measurement,
    Preference,
    choose_measurement,
    join_gradients,
    measurement_hash,
    measurements_in,
    prefer_measurement,
    preferred_measurement,
    run_measurement,
    settle_preference,
)
from tip_analysis.core.errors import (
    ConfigurationMismatchError,
    OptionError,
    RunError,
    SchemaError,
    UnknownNameError,
)
from tip_analysis.core.run_folder import Run, open_run

ALL = Measurement("reverse_kl", "all", "probe", 32, 0)
HEAD = Measurement("reverse_kl", "head", "probe", 32, 0)
EXACT = Measurement("reverse_kl", "all", "exact", 0, 0)


@pytest.fixture(scope="module")
def tables() -> Tables:
    return make_tables(num_prompts=3, rollouts_per_prompt=2, mean_length=12)


@pytest.fixture
def run(tables, tmp_path) -> Run:
    bare = Tables(
        tables.rollouts,
        tables.tokens,
        tables.gradients.clear(),
        tables.masks.clear(),
        tables.vocabulary,
    )
    return open_run(write_run(tmp_path / "run", bare))


def add_three(run: Run, tables: Tables) -> None:
    for frame in make_three_measurements(tables):
        write_measurement(run.path, frame)


def test_gradients_are_joined_one_measurement_at_a_time(tables) -> None:
    joined = join_gradients(tables.tokens, tables.gradients, loss="forward_kl").collect()
    assert joined.height == tables.tokens.height
    assert joined["position"].to_list() == tables.tokens["position"].to_list()
    other = pl.concat([tables.gradients, tables.gradients.with_columns(seed=pl.lit(1, pl.Int64))])
    with pytest.raises(OptionError, match="2 measurements of gradients fit"):
        join_gradients(tables.tokens, other)
    assert join_gradients(tables.tokens, other, seed=1).collect().height == tables.tokens.height
    with pytest.raises(SchemaError, match="no gradients with loss=jsd"):
        join_gradients(tables.tokens, tables.gradients, loss="jsd")
    with pytest.raises(SchemaError, match="grad_norm_sq"):
        join_gradients(tables.tokens, tables.gradients.drop("grad_norm_sq"))


def test_one_is_taken_and_several_are_refused_without_a_preference() -> None:
    forward = Measurement("forward_kl", "all", "probe", 64, 0)
    found = [ALL, HEAD, EXACT, forward]
    assert choose_measurement(found, loss="forward_kl") == forward
    for wanted, expected in (
        ({"param_scope": "head"}, HEAD),
        ({"method": "exact"}, EXACT),
        ({"num_probes": 32, "param_scope": "all"}, ALL),
    ):
        assert choose_measurement(found, wanted=Preference(**wanted)) == expected
    with pytest.raises(OptionError, match=r"3 measurements.*param_scope=head.*--measurement") as no:
        choose_measurement(found)
    assert "\n" not in str(no.value)
    with pytest.raises(OptionError, match="2 measurements"):
        choose_measurement(found, wanted=Preference(param_scope="all"))
    with pytest.raises(SchemaError, match=r"loss=reverse_kl param_scope=lora.*method=exact"):
        choose_measurement(found, wanted=Preference(param_scope="lora"))


def test_a_preference_settles_only_what_is_open() -> None:
    found = [ALL, HEAD, EXACT]
    assert choose_measurement(found, preferred=HEAD.setting) == HEAD
    wanted = Preference(method="exact")
    assert choose_measurement(found, wanted=wanted, preferred=HEAD.setting) == EXACT
    other = Preference("lora", "probe", 8, 3)
    with pytest.raises(OptionError, match="3 measurements"):
        choose_measurement(found, preferred=other)
    assert choose_measurement([EXACT], preferred=other) == EXACT


def test_a_run_prefers_what_it_was_given_first(run, tables) -> None:
    with pytest.raises(RunError, match="tip-analysis gradients"):
        run_measurement(run)
    first, second, third = make_three_measurements(tables)
    settle_preference(run, ALL.setting)
    assert preferred_measurement(run) == ALL.setting
    write_measurement(run.path, first)
    for setting, frame in ((HEAD.setting, second), (EXACT.setting, third)):
        settle_preference(run, setting)
        write_measurement(run.path, frame)
        assert run_measurement(run) == ALL
    prefer_measurement(run, EXACT.setting)
    assert run_measurement(run) == EXACT
    with pytest.raises(OptionError, match="seed must be given"):
        prefer_measurement(run, Preference("all", "exact", 0))


def test_a_preference_is_not_guessed_for_measurements_without_a_record(run, tables) -> None:
    first, second, _ = make_three_measurements(tables)
    write_measurement(run.path, first)
    settle_preference(run, HEAD.setting)  # what was there comes first
    assert preferred_measurement(run) == ALL.setting
    run.update(lambda record: record.pop("preferences"))
    write_measurement(run.path, second)
    settle_preference(run, EXACT.setting)
    assert preferred_measurement(run) is None
    with pytest.raises(OptionError, match="2 measurements"):
        run_measurement(run)


def test_a_preference_for_what_is_gone_is_replaced(run, tables) -> None:
    prefer_measurement(run, EXACT.setting)
    settle_preference(run, HEAD.setting)
    assert preferred_measurement(run) == HEAD.setting


def test_every_measurement_is_listed_once(tables) -> None:
    every = pl.concat(
        [*make_three_measurements(tables), tables.gradients.filter(loss="forward_kl")]
    )
    found = measurements_in(every.lazy())
    assert set(found) == {ALL, HEAD, EXACT, Measurement("forward_kl", "all", "probe", 32, 0)}
    assert [one.loss for one in found] == ["reverse_kl"] * 3 + ["forward_kl"]
    for one, frame in zip([ALL, HEAD, EXACT], make_three_measurements(tables), strict=True):
        assert one.rows(every.lazy()).collect().equals(frame)


def test_the_oracle_selects_by_the_preferred_measurement_and_says_so(run, tables) -> None:
    add_three(run, tables)
    with pytest.raises(OptionError, match="3 measurements"):
        write_masks(run, rules=["gradient_oracle"], retention_ratios=[0.2])
    assert not run.has("masks")
    for one, frame in zip([ALL, HEAD, EXACT], make_three_measurements(tables), strict=True):
        mask = write_masks(
            run,
            rules=["gradient_oracle"],
            retention_ratios=[0.2],
            measurement=one.setting,
            overwrite=True,
        )
        assert recorded_measurements(run) == [one]
        phi = frame.select("rollout_id", "position", "grad_dot_loss")
        ranked = phi.sort("grad_dot_loss", descending=True)
        sizes = mask.group_by("rollout_id").len().iter_rows()
        for rollout, size in sizes:
            best = ranked.filter(rollout_id=rollout).head(size)
            kept = mask.filter(rollout_id=rollout)
            assert set(kept["position"]) == set(best["position"])
    prefer_measurement(run, ALL.setting)
    with pytest.raises(ConfigurationMismatchError, match=r"measurement.*exact"):
        write_masks(run, rules=["gradient_oracle"], retention_ratios=[0.2])


def test_a_measurement_keeps_its_hash_when_another_is_added(run, tables) -> None:
    first, second, _ = make_three_measurements(tables)
    write_measurement(run.path, first)
    before = measurement_hash(run, ALL)
    write_measurement(run.path, second)
    assert measurement_hash(run, ALL) == before
    assert measurement_hash(run, HEAD) != before


def test_a_preference_reads_as_it_is_typed() -> None:
    typed = ["param_scope=last:2", "method=exact", "num_probes=0", "seed=3"]
    preference = Preference.parse(typed)
    assert preference == Preference("last:2", "exact", 0, 3)
    assert str(preference).split() == typed
    assert str(Preference.parse(["seed=1"])) == "seed=1"
    assert HEAD.words() == "reverse_kl over the head, 32 probes, seed 0"
    for text, error, match in (
        ("exact", OptionError, "KEY=VALUE"),
        ("method=", OptionError, "KEY=VALUE"),
        ("seed=one", OptionError, "whole number"),
        ("scope=all", UnknownNameError, "param_scope"),
        ("method=guess", UnknownNameError, "exact"),
    ):
        with pytest.raises(error, match=match):
            Preference.parse([text])
