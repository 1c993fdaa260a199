"""Arguments of every command.

Only names are imported here, so that ``--help`` and a wrong argument are answered at once. An
option that sets a field of a recipe has the name of that field.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import get_args

from verl_vla.cli.options import (
    Parser,
    add_num_slots,
    add_num_workers,
    add_overrides,
    add_policy_options,
    check_words,
)
from verl_vla.config.choices import (
    ACTION_ROWS,
    ALL_BASES,
    CAMERAS,
    DECODINGS,
    DTYPES,
    GPUS,
    PERTURBATIONS,
    PROTOCOLS,
    SUITES,
    SUITES_WITH_EXPERTS,
    Fixtures,
    Split,
)

STDOUT = "-"
"""Value of ``doctor --json`` without a file."""
SHELLS = ("bash", "zsh", "fish")
QUICKSTARTS = {"mini": "quickstart", "libero_spatial": "quickstart_libero_spatial"}
"""Recipe of each suite that has an embedded base policy."""
BENCHMARKS = {
    "images": "image preprocessing for the policy, one thread",
    "env": "one simulator against LIBERO's stock environment: a chunk, and a reset",
    "video": "an episode with and without a video for a reward",
    "memory": "memory of one simulator process, task by task",
    "pool": "speed with more and more simulator processes",
    "rollout": "a rollout with and without overlap of policy and simulators",
    "update": "forward and backward passes over rows, and their memory",
    "driver": "what the driver does in a training step while no GPU works",
    "step": "complete training steps against those of another commit",
    "gpu": "a 7.5 B policy with random weights on one device, without the hub and Ray",
    "page": "write the tables of docs/benchmarks.md from the records in docs/benchmarks",
}
"""One-line help of each benchmark; a benchmark is a module of `verl_vla.diagnostics.benchmarks`."""


def parse(command: str, arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the arguments of a command; a wrong one ends the process with its usage.

    Raises:
        ConfigError: a number is out of its bounds.
    """
    if command == "bench" and arguments and arguments[0] in BENCHMARKS:
        # the other options are those of the benchmark's module, which is slow to import
        return argparse.Namespace(part=arguments[0], rest=list(arguments[1:]))
    # intermixed: KEY=VALUE may stand before, between and after options
    options = make_parser(command).parse_intermixed_args(arguments)
    check_words(options)
    return options


def make_parser(command: str) -> Parser:
    """Make the parser of a command."""
    add_arguments = COMMANDS[command]
    parser = Parser(prog=f"verl-vla {command}", description=add_arguments.__doc__)
    add_arguments(parser)
    return parser


def _train(parser: Parser) -> None:
    """Improve a policy with GRPO under veRL; the same command resumes."""
    add_overrides(parser)


def _explain(parser: Parser) -> None:
    """Print every option of a recipe with its value, its origin and its meaning."""
    add_overrides(parser)


def _plan(parser: Parser) -> None:
    """Print whether a recipe fits a machine and how long it takes; exit code 1 if it does not."""
    add_overrides(parser)
    parser.add_argument("--gpu", choices=list(GPUS), help="kind of GPU of every rank")
    parser.add_argument("--num-nodes", type=int, help="number of nodes, as cluster.num_nodes")
    parser.add_argument(
        "--kernels",
        action="store_true",
        help="also count the kernels of an update, class by class (half a minute)",
    )
    output = parser.add_mutually_exclusive_group()
    output.add_argument(
        "--replay",
        action="store_true",
        help="also run a training step of one rank at its full size, without a GPU (minutes)",
    )
    output.add_argument("--json", action="store_true", help="print one JSON object of the sums")


def _recipes(parser: Parser) -> None:
    """List the recipes that come with the project."""


def _completion(parser: Parser) -> None:
    """Print the script with which a shell completes commands, options and recipes."""
    parser.add_argument("shell", choices=SHELLS, help="shell that reads the script")


def _eval(parser: Parser) -> None:
    """Evaluate a policy; the same command resumes. Needs neither veRL nor Ray."""
    add = parser.add_argument
    add("--policy", required=True, help="folder of a checkpoint")
    add(
        "--suite",
        required=True,
        help=f"suite: {', '.join(SUITES)}, a perturbed one such as libero_plus, "
        f"path/to/file.py:ClassName, or {ALL_BASES} with --perturbation plus",
    )
    add(
        "--tasks",
        type=int,
        nargs="+",
        help="task ids; with --perturbation those of the unperturbed suite; all if not given",
    )
    add("--episodes-per-task", type=int, help="starts per task; all recorded ones if not given")
    add(
        "--protocol",
        choices=PROTOCOLS,
        help="published: all tasks and recorded init states, greedy, openvla-oft's step limits, "
        "256 px, and a table with published rates; for LIBERO's suites of ten tasks",
    )
    add(
        "--states",
        choices=get_args(Split),
        # no default here: a protocol decides too, and must know what was not given
        help="starts: held_out (default); official: all recorded ones; sampled: new ones",
    )
    add(
        "--fixtures",
        choices=get_args(Fixtures),
        help="where LIBERO's cabinets, stoves and racks stand: redrawn for each init state as in "
        "openvla-oft (default with --states official), or first, in one place (else)",
    )
    add("--temperature", type=float, help="sampling temperature; 0 (default) is greedy")
    add("--step-limit", help="step limit: published (default), simplevla, or a number")
    add_policy_options(parser)
    add("--dtype", choices=sorted(DTYPES), default="float32", help="dtype of the policy")
    add("--seed", type=int, default=0, help="seed of the sampling noise")
    add_num_workers(parser)
    add_num_slots(parser, default=16)
    add(
        "--perturbation",
        nargs="+",
        help="perturbations of the suite, compared with the unperturbed control: "
        f"{', '.join(PERTURBATIONS)}",
    )
    add("--control", help="earlier eval of the unperturbed suite; evaluated too if not given")
    add("--tasks-per-axis", type=int, help="largest number of perturbed tasks per axis")
    add("--out", required=True, help="folder of the results")


def _compare(parser: Parser) -> None:
    """Compare two evaluations on the same starts: which policy is better?"""
    parser.add_argument("first", metavar="A", help="evaluation of the first policy")
    parser.add_argument("second", metavar="B", help="evaluation of the second policy")
    parser.add_argument("--out", help="JSON file of the same numbers")


def _replay(parser: Parser) -> None:
    """Make a video of a recorded episode."""
    parser.add_argument("run", metavar="RUN", help="folder of a training run or of eval")
    parser.add_argument("--episode", type=int, required=True, help="episode id in episodes.jsonl")
    parser.add_argument("--out", help="video file; RUN/replays/episode_ID.mp4 if not given")


def _report(parser: Parser) -> None:
    """Write report.html of a training run."""
    parser.add_argument("run", metavar="RUN", help="folder of a training run")


def _dashboard(parser: Parser) -> None:
    """Serve a local page on runs, finished or not."""
    parser.add_argument("runs", metavar="RUNS_DIR", help="folder that contains runs, at any depth")
    parser.add_argument("--port", type=int, default=8421, help="TCP port, 8421 if not given")
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen on; any but 127.0.0.1 is open to other machines too",
    )


def _doctor(parser: Parser) -> None:
    """Check whether this machine, or a checkpoint, can train; exit code 1 if there is a fault."""
    add_overrides(parser)
    add = parser.add_argument
    add(
        "--policy",
        help="folder of a checkpoint to check instead of the machine; with --libero, in addition",
    )
    add("--libero", action="store_true", help="compare machine and checkpoint with LIBERO's own")
    # three cases: absent, alone (to stdout), with a file
    add("--json", nargs="?", const=STDOUT, help="with --libero, write JSON to a file or to stdout")
    add("--out", help="folder in which runs will be written; the recipe's out, or runs")
    add("--fix", action="store_true", help="print commands that fix the faults, without running")
    add(
        "--suite",
        help=f"suite whose held-out images test the weights: {', '.join(SUITES)}; with --libero, "
        "the suite that the policy's action statistics must match",
    )
    add("--images", type=int, default=8, help="number of images to test")
    add_policy_options(parser)
    add("--dtype", choices=sorted(DTYPES), default="float32", help="dtype of the policy")


def _check_suite(parser: Parser) -> None:
    """Build every task of a suite and count failures by reason."""
    add = parser.add_argument
    add("--suite", required=True, help="any suite, such as libero_spatial_swap or libero_plus")
    add("--tasks", type=int, nargs="+", help="task ids; all if not given")
    add("--every", type=int, default=1, help="check only every EVERY-th task")
    add("--out", help="JSON file of the results, updated during the check")


def _demos(parser: Parser) -> None:
    """Record demonstrations of scripted experts, in LIBERO's layout."""
    add = parser.add_argument
    add("--suite", default="mini", help=", ".join(SUITES_WITH_EXPERTS))
    add("--tasks", type=int, nargs="+", help="task ids; all if not given")
    add("--episodes-per-task", type=int, default=60, help="episodes per task")
    add("--render-size", type=int, default=128, help="side of the camera images, pixels")
    add("--cameras", nargs="+", choices=CAMERAS, default=CAMERAS, help="cameras to record")
    add("--seed", type=int, default=0, help="seed of starts, pace, disturbances and errors")
    add_num_workers(parser)
    add("--out", required=True, help="folder to write, one file per task, or an .hdf5 of one task")
    add = parser.add_argument_group("experts that are disturbed or biased").add_argument
    add(
        "--noise",
        type=float,
        default=0.0,
        help="standard deviation of disturbances",
    )
    add("--every", type=int, default=1, help="steps between images")
    add(
        "--height-error",
        type=float,
        default=0.0,
        help="largest error in metres of a biased expert, which takes objects to be higher; its "
        "failures are recorded too",
    )


def _sft(parser: Parser) -> None:
    """Fine-tune a policy on demonstrations, with a recipe."""
    add_overrides(parser)


def _new_policy(parser: Parser) -> None:
    """Assemble a scratch VLA from a language model and vision towers."""
    add = parser.add_argument
    add("--language", required=True, help="folder of a causal language model")
    add("--vision", required=True, nargs="+", help="folders of one or two SigLIP models")
    add(
        "--demos",
        required=True,
        help="folder of demonstrations in LIBERO's layout, which give the normalization stats",
    )
    add("--decoding", choices=DECODINGS, default=DECODINGS[0], help="decoding of action tokens")
    add(
        "--action-rows",
        choices=ACTION_ROWS,
        default=ACTION_ROWS[0],
        help="embedding rows of the action tokens",
    )
    add("--lora-rank", type=int, default=32, help="rank of the adapters; 0 trains all weights")
    add("--num-views", type=int, default=1, help="number of cameras, 1 or 2")
    add("--chunk-length", type=int, default=8, help="actions of one policy step")
    add("--dtype", choices=sorted(DTYPES), default="bfloat16", help="dtype of the policy")
    add("--seed", type=int, default=0, help="seed of projector and adapters")
    add("--out", required=True, help="checkpoint folder to write")


def _convert(parser: Parser) -> None:
    """Make a checkpoint folder readable: .bin, prefixes of wrappers, adapters, norm_stats."""
    add = parser.add_argument
    add("source", metavar="SOURCE", help="folder of a checkpoint or of PEFT's adapters; only read")
    add("target", metavar="TARGET", help="new folder to write")
    add("--base", help="folder of the adapters' base; the one that they name if not given")
    add("--dry-run", action="store_true", help="print what would be done, and write nothing")


def _reward_bench(parser: Parser) -> None:
    """Measure rewards before training on them: do they rank failures?"""
    add = parser.add_argument
    add("--rewards", required=True, help="NAME,LABEL=NAME,... or a .yaml file of them")
    add(
        "--reward-args",
        nargs="+",
        default=[],
        metavar="LABEL.KEY=VALUE",
        help="constructor arguments of the rewards",
    )
    add("--out", required=True, help="folder of the results; a repeated call reuses its episodes")
    add("--episodes-from", help="folder of earlier episodes to read instead of new rollouts")
    add("--seed", type=int, default=0, help="seed of starts, noise, rewards and intervals")
    add("--groups-per-update", type=int, default=8, help="groups that a reward learns from at once")
    add("--curve-groups", type=int, default=16, help="groups with progress curves; 0 for none")
    add_num_workers(parser)
    # no defaults: they are in `PlayConfig`, and --episodes-from refuses what was given
    add = parser.add_argument_group("rollouts").add_argument
    add("--policy", help="folder of a checkpoint")
    add("--suite", help=f"suite: {', '.join(SUITES)}")
    add("--tasks", type=int, nargs="+", help="task ids; all if not given")
    add("--groups", type=int, help="total number of groups, each with a different training start")
    add("--group-size", type=int, help="episodes per group")
    add("--temperature", type=float, help="sampling temperature of the action tokens")
    add("--step-limit", help="step limit: published, simplevla, or a number")
    add_policy_options(parser)
    add("--dtype", choices=sorted(DTYPES), help="dtype of the policy")
    add_num_slots(parser, default=None)


def _quickstart(parser: Parser) -> None:
    """Train the embedded policy on this machine and show its success before and after."""
    add = parser.add_argument
    add("--suite", choices=QUICKSTARTS, default="mini", help="suite; mini if not given")
    add("--total-training-steps", type=int, help="training steps; the recipe's if not given")
    add("--seed", type=int, help="seed of the run; 0 if not given")
    add("--out", help="run folder; runs/RECIPE_seedS if not given")


def _soak(parser: Parser) -> None:
    """Roll out thousands of episodes while simulators crash; nothing may grow."""
    add = parser.add_argument
    add("--policy", default="bases/mini", help="folder of a checkpoint")
    add("--tasks", type=int, nargs="+", default=[0, 6], help="task ids of the mini suite")
    add("--episodes", type=int, default=2000, help="least number of episodes")
    add("--block", type=int, default=80, help="episodes between two samples")
    add("--step-limit", type=int, default=16, help="step limit; small, so that episodes are short")
    add("--crash-share", type=float, default=0.01, help="share of episodes that crash")
    add_num_workers(parser)
    add_num_slots(parser, default=16)
    add("--out", default="soak.json", help="JSON file of the results")


def _chaos(parser: Parser) -> None:
    """Inject faults into real trainings; each must end as it should and resume unchanged."""
    add = parser.add_argument
    add("--faults", nargs="+", metavar="NAME", help="faults by name; all if not given")
    add("--out", default="chaos", help="new folder of the trainings and of chaos.json")


def _bench(parser: Parser) -> None:
    """Measure the speed of a part; prints a table, then one JSON object on the last line."""
    listed = "\n".join(f"  {name:<8} {text}" for name, text in BENCHMARKS.items())
    # the default formatter would fill the list of parts into one paragraph
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = f"parts:\n{listed}\n\n`bench PART -h` lists the options of a part."
    parser.add_argument("part", choices=list(BENCHMARKS), metavar="PART", help="part to measure")


COMMANDS: dict[str, Callable[[Parser], None]] = {
    "train": _train,
    "eval": _eval,
    "compare": _compare,
    "replay": _replay,
    "report": _report,
    "dashboard": _dashboard,
    "doctor": _doctor,
    "check-suite": _check_suite,
    "demos": _demos,
    "sft": _sft,
    "new-policy": _new_policy,
    "convert": _convert,
    "reward-bench": _reward_bench,
    "quickstart": _quickstart,
    "soak": _soak,
    "chaos": _chaos,
    "bench": _bench,
    "recipes": _recipes,
    "plan": _plan,
    "explain": _explain,
    "completion": _completion,
}
"""Command to the function that adds its arguments; each is also a module of `verl_vla.cli`."""
