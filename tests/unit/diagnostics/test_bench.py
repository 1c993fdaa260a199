"""What a benchmark says beside its number."""

from __future__ import annotations

import json

import pytest

from verl_vla.cli import bench
from verl_vla.cli.arguments import parse
from verl_vla.core.errors import ConfigError

SMALL = ["images", "--render-size", "32", "--image-size", "28", "--batch", "2", "--rounds", "3"]


def test_the_images_are_counted_and_the_conditions_stand_beside(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert bench.run(parse("bench", SMALL)) == 0
    *table, last = capsys.readouterr().out.splitlines()
    record = json.loads(last)
    low, high = record["images_per_core_second_range"]
    assert 0 < low <= record["images_per_core_second"] <= high
    assert (record["render_size"], record["image_size"], record["threads"]) == (32, 28, 1)
    assert {"simplejpeg", "scipy"} <= record["versions"].keys()
    assert {"python", "machine", "commit", "load_average_at_end"} <= record["conditions"].keys()
    assert [line.split()[0] for line in table] == list(record)


@pytest.mark.parametrize("option", ["--batch", "--rounds", "--render-size", "--image-size"])
def test_nothing_to_measure_is_refused(option: str) -> None:
    with pytest.raises(ConfigError, match=f"{option} is 0; set at least 1"):
        bench.run(parse("bench", [*SMALL, option, "0"]))


def test_a_part_must_be_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench.run(parse("bench", []))
    assert "PART" in capsys.readouterr().err
