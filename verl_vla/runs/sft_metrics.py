"""Every number that a fine-tuning step reports, declared once."""

from __future__ import annotations

from verl_vla.runs.metrics import METRICS, Metric

SFT_METRICS: dict[str, Metric] = {
    "sft/loss": Metric(
        unit="nats",
        meaning="cross-entropy over the whole vocabulary, mean of the batch's action tokens and "
        "stops",
    ),
    "sft/accuracy": Metric(
        unit="share", meaning="of the batch's action tokens whose likeliest bin is demonstrated"
    ),
    "sft/grad_norm": Metric(unit="1", meaning="before clipping"),
    "sft/skipped": Metric(
        unit="count", meaning="1 where the step was left out: loss or gradient was not finite"
    ),
    "sft/lr": Metric(unit="1", meaning="learning rate of the step"),
    "sft/held_out_loss": Metric(unit="nats", meaning="as sft/loss, on the held-out episodes"),
    "sft/held_out_accuracy": Metric(
        unit="share", meaning="open-loop token accuracy on the held-out episodes, centre crop"
    ),
    "time/step_s": Metric(unit="s", meaning="forward, backward and optimizer step"),
    "time/data_s": Metric(unit="s", meaning="waiting for the step's samples"),
    "time/test_s": Metric(unit="s", meaning="open-loop test"),
    "time/checkpoint_s": Metric(unit="s", meaning="writing the step's checkpoint"),
} | {
    name: METRICS[name]
    for name in (
        "eval/success_rate",
        "eval/episodes",
        "eval/ci_low",
        "eval/ci_high",
        "time/evaluation_s",
    )
}
"""Name to declaration; besides these, ``eval/task/...`` is an open family."""
