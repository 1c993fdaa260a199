"""What the ranks report of an update, added up."""

from __future__ import annotations

import numpy as np
import pytest

from verl_vla.runs.metrics import check_declared
from verl_vla.trainer.grpo.update_metrics import summarise_no_update, summarise_update

REPORTED = {
    "optimizer_step": [0, 0, 1],
    "loss_sum": [0.5, -0.25, 1.0],
    "num_tokens": [10, 30, 20],
    "num_clipped_low": [1, 0, 2],
    "num_clipped_high": [0, 0, 6],
    "ratio_sum": [10.0, 30.2, 26.0],
    "ratio_deviation": [0.01, 0.02, 0.7],
    "entropy_sum": [10.0, 60.0, 50.0],
    "num_rows": [2, 4, 4],
    "num_rows_idle": [0, 1, 2],
    "grad_norm": [3.0, 5.0],
    "lr": [1e-4, 2e-4],
}
"""Two micro-batches in a first optimizer step and one in a second."""


def summarise(reported, num_padding=1):
    return summarise_update(reported, num_padding, num_left_out=5)


def test_the_sums_become_the_declared_metrics():
    values = summarise(REPORTED)
    check_declared(values)
    assert values == pytest.approx(
        {
            "actor/pg_loss": 1.25 / 2,
            "actor/grad_norm": 4.0,
            "actor/skipped_steps": 0.0,
            "actor/lr": 2e-4,
            "actor/entropy": 120 / 60,
            "actor/ratio_first": 40.2 / 40,
            "actor/ratio_first_deviation": 0.02,
            "actor/pg_clipfrac_low": 3 / 60,
            "actor/pg_clipfrac_high": 6 / 60,
            "actor/mini_batches": 2,
            "actor/rows": 9,
            "actor/padding_rows": 1,
            "actor/rows_left_out": 5,
            "actor/rows_without_gradient": 2,
        }
    )


def test_a_step_without_an_update_reports_the_same_numbers():
    values = summarise_no_update(num_left_out=7, num_mini_batches=4, lr=1e-4)
    assert values.keys() == summarise(REPORTED).keys()
    known = {name: value for name, value in values.items() if not np.isnan(value)}
    assert known == {
        "actor/skipped_steps": 4,
        "actor/lr": 1e-4,
        "actor/mini_batches": 0,
        "actor/rows": 0,
        "actor/padding_rows": 0,
        "actor/rows_left_out": 7,
        "actor/rows_without_gradient": 0,
    }


@pytest.mark.parametrize(
    ("norms", "mean", "skipped"),
    [([3.0, np.nan], 3.0, 1), ([np.inf, 5.0], 5.0, 1), ([np.nan, np.nan], np.nan, 2)],
)
def test_a_step_that_was_left_out_is_counted_and_not_averaged(norms, mean, skipped):
    values = summarise(REPORTED | {"grad_norm": norms})
    assert values["actor/grad_norm"] == pytest.approx(mean, nan_ok=True)
    assert values["actor/skipped_steps"] == skipped


def test_the_divergence_is_reported_where_the_loss_has_a_kl_term():
    assert "actor/kl_loss" not in summarise(REPORTED)
    values = summarise(REPORTED | {"kl_sum": [0.0, 0.2, 1.0]})
    check_declared(values)
    assert values["actor/kl_loss"] == pytest.approx(1.2 / 60)


def nest(values):
    """The same numbers as veRL hands them on: a list per rank of lists per mini-batch."""
    return [[list(values[:2])], [list(values[2:])]]


def test_however_verl_nests_the_lists_the_result_is_the_same():
    nested = {name: nest(values) for name, values in REPORTED.items()}
    assert summarise(nested) == summarise(REPORTED)


def test_single_numbers_and_numpy_numbers_are_lists_of_one():
    single = {name: np.float32(values[0]) for name, values in REPORTED.items()}
    assert summarise(single) == pytest.approx(
        summarise({name: values[:1] for name, values in REPORTED.items()})
    )


def test_the_first_mini_batch_alone_shows_whether_rollout_and_update_agree():
    drifted = REPORTED | {"ratio_sum": [10.0, 30.0, 99.0], "ratio_deviation": [0.0, 0.0, 9.0]}
    values = summarise(drifted)
    assert values["actor/ratio_first"] == 1.0
    assert values["actor/ratio_first_deviation"] == 0.0


def test_the_split_into_micro_batches_does_not_show():
    sums = (
        "loss_sum",
        "num_tokens",
        "num_clipped_low",
        "num_clipped_high",
        "ratio_sum",
        "entropy_sum",
        "num_rows",
        "num_rows_idle",
    )
    merged = {
        name: [values[0] + values[1], values[2]]
        for name, values in REPORTED.items()
        if name in sums
    }
    merged |= {"optimizer_step": [0, 1], "ratio_deviation": [0.02, 0.7]}
    whole = summarise(REPORTED | merged)
    assert whole == pytest.approx(summarise(REPORTED))


def test_an_update_without_a_token_is_zero_and_not_an_error():
    nothing = {name: [0.0] for name in REPORTED}
    values = summarise(nothing)
    assert values["actor/entropy"] == values["actor/pg_clipfrac_low"] == 0


def test_a_missing_report_is_not_hidden():
    with pytest.raises(KeyError, match="entropy_sum"):
        summarise({k: v for k, v in REPORTED.items() if k != "entropy_sum"})


def test_an_update_of_a_single_token_is_divided_by_one():
    single = {name: [0.0] for name in REPORTED}
    single |= {"num_tokens": [1], "entropy_sum": [3.0], "ratio_sum": [1.5], "num_clipped_low": [1]}
    values = summarise(single)
    assert (values["actor/entropy"], values["actor/ratio_first"]) == (3.0, 1.5)
    assert values["actor/pg_clipfrac_low"] == 1.0
