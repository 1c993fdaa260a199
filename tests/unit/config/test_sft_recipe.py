"""Fine-tuning recipes: files, overrides, and what is refused."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from verl_vla.cli.main import EXIT_USAGE, main
from verl_vla.config.compose import recipe_names
from verl_vla.config.sft import SFT_RECIPES_FOLDER, SFTOptimizerConfig, SFTRecipe, load_sft_recipe
from verl_vla.core.errors import ConfigError

OPEN = {
    "base_libero_spatial": [],
    "base_mini": [],
    "sft_libero": ["demos.folder=demos", "policy.path=checkpoint"],
    "sft_mini": [],
    "sft_qwen3b": ["demos.folder=demos"],
}


def load(*overrides: str) -> SFTRecipe:
    return load_sft_recipe(["recipe=sft_mini", *overrides])


def test_every_recipe_of_the_project_can_be_read(capsys: pytest.CaptureFixture[str]) -> None:
    names = recipe_names(SFT_RECIPES_FOLDER)
    assert names == sorted(OPEN)
    for name in names:
        assert (SFT_RECIPES_FOLDER / f"{name}.yaml").read_text().startswith("# ")
        load_sft_recipe([f"recipe={name}", *OPEN[name]])
    assert not set(names) & set(recipe_names()), "no recipe of training"
    assert main(["recipes"]) == 0
    assert {line.split()[0] for line in capsys.readouterr().out.splitlines()} == {
        *names,
        *recipe_names(),
    }


def test_the_published_settings() -> None:
    """openvla-oft vla-scripts/finetune.py and LIBERO.md."""
    recipe = load_sft_recipe(["recipe=sft_libero", *OPEN["sft_libero"]])
    assert (recipe.policy.lora_rank, recipe.policy.lora_alpha) == (32, 16)
    assert recipe.optimizer.batch_size / recipe.cluster.num_ranks == 8
    assert recipe.trainer.total_training_steps == 150_000
    rates = [
        recipe.optimizer.lr * recipe.optimizer.lr_factor(s, 150_000) for s in (0, 99_999, 100_000)
    ]
    assert rates == pytest.approx([5e-4, 5e-4, 5e-5])
    assert recipe.optimizer.clip_grad is None
    assert recipe.demos.augment
    assert recipe.demos.choice.filter_noops
    assert (recipe.demos.images, recipe.demos.replay) == ("rerendered", True)
    assert (recipe.demos.choice.held_out_per_task, recipe.trainer.test_every) == (0, 0)


def test_the_memory_of_the_qwen_recipe_adds_up() -> None:
    """Its weights are counted in test_scratch_vla_assembly.py; GB are 1e9 bytes."""
    text = (SFT_RECIPES_FOLDER / "sft_qwen3b.yaml").read_text()
    *parts, whole = (float(gb) for gb in re.findall(r"^#  .* (\d+\.\d\d)$", text, re.MULTILINE))
    assert sum(parts) == pytest.approx(whole)
    bytes_of_weights = (3_085_938_688 * 4, 412_987_248 * 4, 67_473_408 * 16)
    assert parts[:3] == [round(size / 1e9, 2) for size in bytes_of_weights]
    assert parts[5:] == [round(8 * 824 * n / 1e9, 2) for n in (36 * 2048 * 2, 49_920 * 2 * 2)]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.lrr=1", "unknown key 'optimizer.lrr'; did you mean 'optimizer.lr'?"),
        ("demoss.folder=x", "unknown key 'demoss'; did you mean 'demos'?"),
        ("demos.choice.per_task=0", "demos.choice.per_task is 0; set 'all' or at least 1"),
        ("demos.choice.per_task=one", "must be int"),
        ("demos.choice.held_out_per_task=-1", "held_out_per_task is -1"),
        ("demos.choice.held_out_per_task=0", "hold some out, or set trainer.test_every=0"),
        ("demos.images=drawn", "choose one of 'rerendered', 'stored'"),
        ("demos.replay=1", "demos.replay is 1"),
        ("demos.folder=''", "demos.folder is empty"),
        ("demos.num_loaders=-1", "demos.num_loaders is -1"),
        ("policy.lora_rank=0", "policy.lora_rank is 0; set at least 1"),
        ("optimizer.batch_size=0", "optimizer.batch_size is 0"),
        ("optimizer.lr=0", "optimizer.lr is 0"),
        ("optimizer.warmup_steps=-1", "optimizer.warmup_steps is -1"),
        ("optimizer.clip_grad=0", "null not to clip"),
        ("optimizer.smoothing=-1", "optimizer.smoothing is -1"),
        ("optimizer.min_lr_ratio=2", "optimizer.min_lr_ratio is 2"),
        ("optimizer.lr_scheduler_type=linear", "choose one of 'multistep', 'cosine'"),
        ("optimizer.betas=[0.9]", "AdamW takes two numbers"),
        ("trainer.save_every=0", "trainer.save_every is 0; set at least 1"),
        ("trainer.eval_every=-1", "trainer.eval_every is -1"),
        ("cluster.num_ranks=5", "5 ranks cannot share evenly"),
        ("cluster.num_ranks=0", "cluster.num_ranks is 0"),
        ("out=''", "out is empty"),
        ("seed=-1", "seed is -1"),
        ("environment.suite=mini environment.tasks=[1,]x", "cannot be read"),
    ],
)
def test_what_cannot_be_is_refused_with_its_remedy(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        load(override)
    assert message in str(refused.value)


def test_one_demonstration_of_each_task_is_a_choice() -> None:
    assert load("demos.choice.per_task=1").demos.choice.per_task == 1
    assert load().demos.choice.per_task == "all"


def test_a_recipe_written_as_yaml_is_the_same_recipe(tmp_path: Path) -> None:
    recipe = load("policy.lora_rank=4", "optimizer.decay_at=[3,5]")
    file = tmp_path / "again.yaml"
    plain = yaml.safe_load(
        yaml.safe_dump(recipe.as_dict() | {"seed": 3}).replace("!!python/tuple", "")
    )
    file.write_text(yaml.safe_dump(plain))
    assert load_sft_recipe([f"recipe={file}"]).optimizer == recipe.optimizer


def test_the_rate_rises_then_falls_in_steps() -> None:
    schedule = SFTOptimizerConfig(warmup_steps=10, decay_at=(20, 30))
    factors = [schedule.lr_factor(step, 40) for step in range(40)]
    assert factors[0] == pytest.approx(0.19)
    assert factors[9:20] == [1.0] * 11
    assert factors[20:30] == pytest.approx([0.1] * 10)
    assert factors[30:] == pytest.approx([0.01] * 10)


def test_the_rate_falls_along_a_cosine() -> None:
    schedule = SFTOptimizerConfig(warmup_steps=10, lr_scheduler_type="cosine", min_lr_ratio=0.1)
    factors = [schedule.lr_factor(step, 100) for step in range(100)]
    assert factors[0] == pytest.approx(0.19)
    assert max(factors) == factors[9] == 1.0
    assert all(a > b for a, b in zip(factors[9:], factors[10:], strict=False))
    assert factors[54] == pytest.approx(0.55)
    assert factors[-1] == pytest.approx(0.1)
    everything = SFTOptimizerConfig(warmup_steps=5, lr_scheduler_type="cosine")
    assert everything.lr_factor(4, 5) == 1.0, "a run may be all warm-up"


def test_the_command_line_refuses_what_is_not_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = tmp_path / "nowhere"
    words = ["sft", "recipe=sft_mini", f"demos.folder='{missing}'", f"out='{tmp_path / 'run'}'"]
    assert main(words) == EXIT_USAGE
    said = capsys.readouterr().err
    assert str(missing) in said
    assert "holds no lift_the_red_cube_demo.hdf5" in said
    assert not (tmp_path / "run").exists()
    assert main(["sft", "recipe=sft_minni"]) == EXIT_USAGE
    assert "did you mean 'sft_mini'?" in capsys.readouterr().err
