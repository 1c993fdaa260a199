"""Declaration of every metric that a fine-tuning step reports."""

from __future__ import annotations

from verl_vla.runs.metrics import METRICS, Metric

SFT_METRICS: dict[str, Metric] = {
    "train/loss": Metric(
        unit="nats",
        meaning="cross-entropy over the whole vocabulary, mean of the batch's action tokens and "
        "stops",
    ),
    "train/accuracy": Metric(
        unit="share", meaning="of the batch's action tokens whose likeliest bin is demonstrated"
    ),
    "train/grad_norm": Metric(unit="1", meaning="before clipping"),
    "train/skipped_steps": Metric(
        unit="count", meaning="1 where the step was left out: loss or gradient was not finite"
    ),
    "train/lr": Metric(unit="1", meaning="learning rate of the step"),
    "val/loss": Metric(unit="nats", meaning="as train/loss, on the held-out episodes"),
    "val/accuracy": Metric(
        unit="share", meaning="open-loop token accuracy on the held-out episodes, centre crop"
    ),
    "timing_s/step": Metric(unit="s", meaning="forward, backward and optimizer step"),
    "timing_s/data": Metric(unit="s", meaning="waiting for the step's samples"),
    "timing_s/validation": Metric(unit="s", meaning="open-loop test"),
    "timing_s/save_checkpoint": Metric(unit="s", meaning="writing the step's checkpoint"),
} | {
    name: METRICS[name]
    for name in (
        "val/success_rate",
        "val/episodes",
        "val/ci_low",
        "val/ci_high",
        "timing_s/testing",
    )
}
"""Declarations by name. Names under ``val/task/`` need no declaration."""
