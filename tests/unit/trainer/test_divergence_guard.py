"""veRL's engine with a real policy, a real optimizer and numbers that are not finite."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed
from mini_engine import make_engine
from safetensors.torch import load_file
from thread_ranks import ThreadRanks
from verl.utils import tensordict_utils as tu

from verl_vla.config.grpo import LossConfig
from verl_vla.core.errors import DivergedError
from verl_vla.core.files import PROJECT_FOLDER
from verl_vla.envs.registry import suite
from verl_vla.trainer.engine import divergence_guard
from verl_vla.trainer.engine.divergence_guard import (
    FiniteGuard,
    all_finite,
    load_rows,
    plain_rows,
)
from verl_vla.trainer.engine.engine import VLAEngine
from verl_vla.trainer.grpo.worker import row_loss
from verl_vla.trainer.verl_compat.process import prepare_verl

NUM_ROWS, NUM_TOKENS, ACTION_DIM = 4, 56, 7
LOSS = partial(row_loss, config=LossConfig(), action_dim=ACTION_DIM, num_ranks=1)


@pytest.fixture(scope="module")
def process_group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    prepare_verl("cpu", option="cluster.device")
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{tmp_path_factory.mktemp('group') / 'store'}",
        rank=0,
        world_size=1,
    )
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture
def engine(process_group: None, tmp_path: Path) -> VLAEngine:
    return make_engine(PROJECT_FOLDER / "bases" / "mini", tmp_path / "diverged")


def rows(engine: VLAEngine, folder: Path, advantage: float, old_log_probs: float = -5.0) -> Any:
    """A mini-batch of random images, in TransferQueue's layout, as read back from a file."""
    torch.manual_seed(0)
    prompt = engine.processor.prompt(suite("mini").tasks[0].instruction)
    action_tokens = torch.randint(0, engine.processor.shape.num_bins, (NUM_ROWS, NUM_TOKENS))
    size = engine.processor.shape.image_size
    images = torch.randint(0, 256, (NUM_ROWS, 1, size, size, 3), dtype=torch.uint8)
    mask = torch.ones(NUM_ROWS, NUM_TOKENS, dtype=torch.long)
    given = {
        "prompts": (prompt,) * NUM_ROWS,
        "responses": tuple(action_tokens),
        "images": tuple(images),
        "proprio": tuple(torch.zeros(NUM_ROWS, 8)),
        "response_mask": tuple(mask),
        "loss_mask": tuple(mask),
        "advantages": tuple(torch.full((NUM_ROWS, 1), advantage)),
        "old_log_probs": tuple(old_log_probs * mask.float()),
        "trajectory_steps": tuple(torch.full((NUM_ROWS, 1), 8)),
        "num_trajectories": tuple(torch.full((NUM_ROWS, 1), NUM_ROWS)),
        "temperature": 1.0,
        "use_dynamic_bsz": False,
        "micro_batch_size_per_gpu": 2,
    }
    torch.save(given, folder / "rows.pt")
    return load_rows(folder / "rows.pt")


def learn(engine: VLAEngine, data: Any) -> float:
    with engine.train_mode():
        return float(engine.train_batch(data, LOSS)["metrics"]["grad_norm"])


def weights_of(engine: VLAEngine) -> dict[str, torch.Tensor]:
    state = engine.module.state_dict()
    return {name: value.full_tensor().clone() for name, value in state.items()}


def moved(before: dict[str, torch.Tensor], engine: VLAEngine) -> bool:
    after = weights_of(engine)
    assert all(bool(value.isfinite().all()) for value in after.values())
    return any(not torch.equal(before[name], after[name]) for name in before)


Spoil = Callable[[VLAEngine, Path], Any]
SPOILED: dict[str, Spoil] = {
    "an advantage that is no number": lambda e, f: rows(e, f, math.nan),
    "an advantage without bound": lambda e, f: rows(e, f, math.inf),
    "a ratio that overflows": lambda e, f: rows(e, f, -1.0, old_log_probs=-1e4),
}


@pytest.mark.parametrize("spoil", SPOILED.values(), ids=SPOILED.keys())
def test_a_step_that_is_not_finite_is_left_out_and_the_next_one_taken(
    engine: VLAEngine, tmp_path: Path, spoil: Spoil
) -> None:
    before = weights_of(engine)
    assert not math.isfinite(learn(engine, spoil(engine, tmp_path)))
    assert not moved(before, engine)
    assert engine.guard.num_in_a_row == 1
    assert engine.num_optimizer_steps == 1
    assert learn(engine, rows(engine, tmp_path, 1.0)) > 0
    assert moved(before, engine)
    assert engine.guard.num_in_a_row == 0
    assert not engine.guard.folder.exists()


def test_a_loss_that_is_not_finite_counts_though_its_gradient_is(
    engine: VLAEngine, tmp_path: Path
) -> None:
    before = weights_of(engine)

    def infinite(**given: Any) -> tuple[torch.Tensor, dict[str, float]]:
        loss, metrics = LOSS(**given)
        return loss + math.inf, metrics

    with engine.train_mode():
        engine.train_batch(rows(engine, tmp_path, 1.0), infinite)
    assert engine.guard.num_in_a_row == 1
    assert not moved(before, engine)


def test_too_many_in_a_row_end_the_run_and_can_be_replayed(
    engine: VLAEngine, tmp_path: Path
) -> None:
    learn(engine, rows(engine, tmp_path, 1.0))
    learn(engine, rows(engine, tmp_path, math.nan))
    with pytest.raises(DivergedError, match="2 optimizer steps in a row were left out") as caught:
        learn(engine, rows(engine, tmp_path, math.inf))
    folder = tmp_path / "diverged"
    assert str(folder) in str(caught.value)
    assert "lower optimizer.lr" in str(caught.value)

    kept = load_file(folder / "policy" / "model.safetensors")
    now = weights_of(engine)
    assert all(torch.equal(now[name], value) for name, value in kept.items())
    again = make_engine(folder / "policy", tmp_path / "again")
    assert not math.isfinite(learn(again, load_rows(folder / "batch_rank_0.pt")))


@pytest.mark.parametrize(
    ("losses", "answers"),
    [
        ([[1.0, -2.0], [0.0]], [True, True]),
        ([[1.0], [2.0, math.nan]], [False, False]),
        ([[math.inf], [math.nan]], [False, False]),
        ([[], []], [True, True]),
    ],
)
def test_every_rank_leaves_out_a_step_that_one_of_them_spoils(
    monkeypatch: pytest.MonkeyPatch, losses: list[list[float]], answers: list[bool]
) -> None:
    prepare_verl("cpu", option="cluster.device")
    group = ThreadRanks(2)
    group.stand_in(monkeypatch)
    assert group.run(*(partial(all_finite, of_rank) for of_rank in losses)) == answers


def test_ranks_compare_their_losses_on_their_device(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.device] = []

    def stop(answer: torch.Tensor, **_: Any) -> None:
        seen.append(answer.device)
        raise KeyError

    monkeypatch.setattr(divergence_guard, "get_device_id", lambda: "meta")
    monkeypatch.setattr(torch.distributed, "all_reduce", stop)
    with pytest.raises(KeyError):
        all_finite([1.0])
    assert seen == [torch.device("meta")]


def test_a_guard_ends_at_its_number_and_counts_again_after_a_step(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    guard = FiniteGuard(folder=tmp_path / "deep" / "diverged", max_in_a_row=2)
    exported: list[Path] = []
    copies: list[int] = []

    def batch() -> dict[str, Any]:
        copies.append(1)
        return {"temperature": 1.0}

    def enter(*norms: float) -> None:
        for norm in norms:
            guard.count(norm, batch, exported.append)

    enter(math.nan, 1.0, math.inf, 0.0, math.nan)
    assert (guard.num_in_a_row, exported, copies) == (1, [], [])
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 3)
    for _ in range(2):  # a rank may come after another has made the folder
        with pytest.raises(DivergedError):
            enter(math.nan)
    assert exported == [guard.folder / "policy"] * 2
    assert torch.load(guard.folder / "batch_rank_3.pt", weights_only=True) == {"temperature": 1.0}


def test_the_rows_of_a_batch_are_kept_as_copies_with_its_plain_values() -> None:
    whole = torch.arange(6.0).view(3, 2)
    nested = torch.nested.as_nested_tensor([torch.zeros(1), torch.ones(2)], layout=torch.jagged)
    data = tu.get_tensordict({"prompts": nested}, {"name": "a", "count": 2, "share": 0.5})
    kept = plain_rows(data)
    assert [row.tolist() for row in kept["prompts"]] == [[0.0], [1.0, 1.0]]
    assert (kept["name"], kept["count"], kept["share"]) == ("a", 2, 0.5)
    dense = plain_rows(tu.get_tensordict({"images": whole}))
    assert [row.tolist() for row in dense["images"]] == whole.tolist()
    assert {row.untyped_storage().nbytes() for row in dense["images"]} == {8}, "not of the whole"


def test_rows_come_back_as_the_engine_takes_them(tmp_path: Path) -> None:
    rows = (torch.arange(2), torch.arange(3))
    torch.save({"prompts": rows, "temperature": 0.5, "note": None}, tmp_path / "rows.pt")
    data = load_rows(tmp_path / "rows.pt")
    assert data["prompts"].is_nested
    assert [row.tolist() for row in data["prompts"].unbind()] == [[0, 1], [0, 1, 2]]
    assert float(tu.get(data, "temperature")) == 0.5
    assert len(data) == 2
