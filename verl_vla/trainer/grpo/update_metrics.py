"""From what the ranks report of an update to the declared metrics."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


def summarise_update(
    reported: Mapping[str, Any], num_padding: int, num_left_out: int
) -> dict[str, float]:
    """Add up the sums of all micro-batches and ranks.

    Args:
        reported: lists with one entry per micro-batch (in the same order under every name), made
            by `verl_vla.trainer.grpo.worker`, and ``grad_norm`` and ``lr`` per optimizer step;
            a norm that is not finite means a skipped step. ``kl_sum`` is among them
            where the loss has a KL term.
        num_padding: rows without content among them, from veRL.
        num_left_out: rows that never reached a rank.
    """
    tokens = _array(reported["num_tokens"])
    # before the first optimizer step the weights are those that played, so ratios should be 1
    first = _array(reported["optimizer_step"]) == 0
    # a step of padding alone has no token
    first_tokens = max(float(tokens[first].sum()), 1.0)
    total = max(float(tokens.sum()), 1.0)
    steps = len(np.unique(_array(reported["optimizer_step"])))
    norm = _array(reported["grad_norm"])
    taken = norm[np.isfinite(norm)]
    values = {
        # the sum of a mini-batch is its mean: the weights of its tokens add up to 1
        "actor/pg_loss": float(_array(reported["loss_sum"]).sum()) / steps,
        # a skipped step has no norm that could enter the mean
        "actor/grad_norm": float(taken.mean()) if len(taken) else math.nan,
        # every rank reports every step, so shares are counted, not entries
        "actor/skipped_steps": float(steps * (1 - len(taken) / len(norm))),
        "actor/lr": float(_array(reported["lr"])[-1]),
        "actor/entropy": float(_array(reported["entropy_sum"]).sum()) / total,
        "actor/ratio_first": float(_array(reported["ratio_sum"])[first].sum()) / first_tokens,
        "actor/ratio_first_deviation": float(_array(reported["ratio_deviation"])[first].max()),
        "actor/pg_clipfrac_low": float(_array(reported["num_clipped_low"]).sum()) / total,
        "actor/pg_clipfrac_high": float(_array(reported["num_clipped_high"]).sum()) / total,
        "actor/mini_batches": float(steps),
        "actor/rows": float(_array(reported["num_rows"]).sum()) - num_padding,
        "actor/padding_rows": float(num_padding),
        "actor/rows_left_out": float(num_left_out),
        # padding has an empty mask, so the ranks count it as idle
        "actor/rows_without_gradient": float(_array(reported["num_rows_idle"]).sum()) - num_padding,
    }
    if "kl_sum" in reported:
        values["actor/kl_loss"] = float(_array(reported["kl_sum"]).sum()) / total
    return values


def summarise_no_update(num_left_out: int, num_mini_batches: int, lr: float) -> dict[str, float]:
    """The same metrics where no row had a gradient; what an update alone would tell is NaN."""
    unknown = (
        "actor/pg_loss",
        "actor/grad_norm",
        "actor/entropy",
        "actor/ratio_first",
        "actor/ratio_first_deviation",
        "actor/pg_clipfrac_low",
        "actor/pg_clipfrac_high",
    )
    return dict.fromkeys(unknown, math.nan) | {
        "actor/skipped_steps": float(num_mini_batches),
        "actor/lr": lr,
        "actor/mini_batches": 0.0,
        "actor/rows": 0.0,
        "actor/padding_rows": 0.0,
        "actor/rows_left_out": float(num_left_out),
        "actor/rows_without_gradient": 0.0,
    }


def _array(values: Any) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Flatten the lists of lists that veRL makes of micro-batches, mini-batches and ranks."""
    flat: list[float] = []
    pending: list[Any] = [values]
    while pending:
        value = pending.pop(0)
        if isinstance(value, Sequence):
            # in order: entries of different names belong together by their position
            pending = [*value, *pending]
        else:
            flat.append(float(value))
    return np.asarray(flat, dtype=np.float64)
