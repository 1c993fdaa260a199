"""Options that several commands take."""

from __future__ import annotations

import argparse

Parser = argparse.ArgumentParser


def add_overrides(parser: Parser) -> None:
    """Add ``recipe=NAME key=value ...``."""
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="KEY=VALUE",
        help="recipe=NAME, then options of the recipe, such as optimizer.lr=1e-5; "
        "`verl-vla recipes` lists recipes, `verl-vla explain recipe=NAME` options",
    )


def add_policy_options(parser: Parser) -> None:
    """Add what is to be known about a policy's folder."""
    add = parser.add_argument
    add("--render-size", type=int, help="side of the camera image, px; the policy's if not given")
    add("--unnorm-key", help="entry of dataset_statistics.json; the suite's if not given")


def add_num_workers(parser: Parser) -> None:
    """Add the number of simulator processes."""
    parser.add_argument("--num-workers", type=int, default=2, help="number of simulator processes")


def add_num_slots(parser: Parser, default: int | None) -> None:
    """Add the number of simulators, shared by the processes."""
    text = "simulator slots: episodes that run at the same time"
    parser.add_argument("--num-slots", type=int, default=default, help=text)
