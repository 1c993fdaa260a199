"""The driver's part of a training step, with real Ray and TransferQueue."""

from __future__ import annotations

import argparse

import pytest

from verl_vla.core.errors import ConfigError
from verl_vla.diagnostics.benchmarks import driver


def options(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    driver.add_options(parser)
    chosen = parser.parse_args(words)
    chosen.arguments = ["driver", *words]
    return chosen


def test_a_round_reaches_the_update_and_every_part_has_its_seconds() -> None:
    sizes = ("--groups", "2", "--group-size", "2", "--policy-steps", "3", "--image-size", "16")
    cut = ("--num-ranks", "2", "--num-mini-batches", "2")
    found = driver.measure(options(*sizes, *cut, "--num-slots", "3", "--answers-per-s", "40"))
    assert found["rows"] == 12
    parts = ("after_the_last_policy_step_s", "dynamic_sampling_s", "advantage_s")
    seconds = [found[part] for part in (*parts, "before_the_update_s")]
    assert min(seconds) >= 0
    assert found["not_overlapped_s"] == pytest.approx(sum(seconds), abs=0.03)
    assert found["policy_steps_per_s"] > 0
    assert found["answers_per_s"] == 40
    assert found["not_overlapped_at_once_s"] >= 0
    assert found["peak_of_the_driver_gib"] > found["images_gib"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--groups", "0"], "--groups is 0"),
        (["--group-size", "1"], "sampling.group_size"),
        (["--groups", "2"], "optimizer.num_mini_batches"),
    ],
)
def test_sizes_that_make_no_step_are_refused(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        driver.measure(options(*words))


def test_a_process_that_fails_is_reported_with_its_last_words(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(driver, "PROGRAM", "verl_vla.no_such_module")
    with pytest.raises(ConfigError, match=r"ended with 1; .*\n.*no_such_module"):
        driver.measure(options())
