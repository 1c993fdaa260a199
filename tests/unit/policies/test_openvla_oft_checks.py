"""The doctor: every way in which a checkpoint has been wrong before is told from a sound one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from verl_vla.cli import doctor as verb
from verl_vla.cli.arguments import parse
from verl_vla.cli.doctor import in_turn
from verl_vla.core.episode import Start
from verl_vla.core.errors import ConfigError
from verl_vla.policies.normalization import ActionStatistics
from verl_vla.policies.openvla_oft import OpenVLAOFTPolicy
from verl_vla.policies.openvla_oft.checks import examine, judge_action_mass
from verl_vla.policies.openvla_oft.tiny import TinySizes, build_tiny_policy
from verl_vla.policies.registry import require_valid

SIZES = TinySizes(image_size=28, vision_width=12, llm_width=16, llm_depth=1, llm_mlp=16)


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("valid") / "policy"
    statistics = ActionStatistics(
        q01=-np.ones(7), q99=np.ones(7), mask=np.array([True] * 6 + [False]), key="mini"
    )
    build_tiny_policy(["lift it"], statistics, sizes=SIZES).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(valid: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(valid, tmp_path / "policy"))


def edit(file: Path, change: Callable[[dict], object]) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def faults(folder: Path) -> dict[str, str]:
    """What is found wrong; the verb's exit code must say the same."""
    found = {f.subject: f.says for f in examine(folder) if f.is_fault}
    assert verb.run(parse("doctor", ["--policy", str(folder)])) == (verb.EXIT_FAULT if found else 0)
    return found


def split_into_shards(folder: Path) -> list[Path]:
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    parts = [names[::2], names[1::2]]
    index = {}
    for number, part in enumerate(parts, 1):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: weights[name] for name in part}, folder / file, {"format": "pt"})
        index |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": 0}, "weight_map": index})
    )
    return sorted(folder.glob("model-*.safetensors"))


def test_a_sound_checkpoint_has_no_fault_and_says_what_it_is(valid: Path) -> None:
    findings = {f.subject: f.says for f in examine(valid)}
    assert faults(valid) == {}
    assert "vision 2 of 3 blocks of 12, language model 1 layers of 16" in findings["architecture"]
    assert "both directions" in findings["attention"]
    assert "'mini', 7 values" in findings["action statistics"]
    assert findings["weights"].endswith("F32")
    require_valid(valid)


def test_shards_are_as_good_as_one_file(folder: Path) -> None:
    split_into_shards(folder)
    assert faults(folder) == {}
    OpenVLAOFTPolicy.from_pretrained(folder)


def test_a_missing_shard_is_named(folder: Path) -> None:
    split_into_shards(folder)[1].unlink()
    assert "['model-00002-of-00002.safetensors'] are missing" in faults(folder)["weights"]


def test_a_truncated_shard_is_named(folder: Path) -> None:
    shard = split_into_shards(folder)[0]
    shard.write_bytes(shard.read_bytes()[:-100])
    says = faults(folder)["weights"]
    assert shard.name in says
    assert "cut off" in says
    assert "fetch it again" in says


def test_weights_in_another_format_are_not_read(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "convert other formats" in faults(folder)["weights"]


def test_a_wrong_epsilon_is_named(folder: Path) -> None:
    edit(folder / "config.json", lambda c: c["text_config"].update(rms_norm_eps=1e-5))
    says = faults(folder)["norm epsilon"]
    assert "1e-05" in says
    assert "trained with 1e-06" in says
    assert "remove the entry" in says


def test_a_regression_head_is_refused_by_the_doctor_and_by_the_policy(folder: Path) -> None:
    (folder / "action_head--150000_checkpoint.pt").write_bytes(b"")
    says = faults(folder)["action head"]
    assert "action_head--150000_checkpoint.pt" in says
    assert "L1-regression" in says
    assert "take one fine-tuned with use_l1_regression False" in says
    with pytest.raises(ConfigError, match="L1-regression"):
        OpenVLAOFTPolicy.from_pretrained(folder)
    with pytest.raises(ConfigError, match="L1-regression"):
        require_valid(folder)


def test_missing_statistics_are_named(folder: Path) -> None:
    (folder / "dataset_statistics.json").unlink()
    says = faults(folder)["action statistics"]
    assert "holds no dataset_statistics.json" in says
    assert "without the ranges of the fine-tuning data" in says
    assert "copy" in says


def test_statistics_of_another_robot_are_named(folder: Path) -> None:
    def shorten(content: dict) -> None:
        for values in content["mini"]["action"].values():
            del values[0]

    edit(folder / "dataset_statistics.json", shorten)
    assert "ranges of 6 values, an action has 7" in faults(folder)["action statistics"]


def test_a_wrong_image_size_is_named(folder: Path) -> None:
    edit(folder / "config.json", lambda c: c.update(image_sizes=[42]))
    says = faults(folder)["weights"]
    assert "pos_embed" in says
    assert "(1, 4, 12) for (1, 9, 12)" in says
    assert "take both from one checkpoint" in says


def test_an_image_that_does_not_fall_into_patches_is_named(folder: Path) -> None:
    edit(folder / "config.json", lambda c: c.update(image_sizes=[30]))
    says = faults(folder)["architecture"]
    assert "images of 30 px" in says
    assert "towers must share a patch size that divides the image size" in says


def test_an_unknown_tower_is_named(folder: Path) -> None:
    edit(folder / "config.json", lambda c: c.update(vision_towers=None, timm_model_ids=["vit_x"]))
    says = faults(folder)["architecture"]
    assert "vit_x" in says
    assert "sizes are not known here" in says
    assert "choose from" in says


def test_weights_of_another_model_are_named(folder: Path) -> None:
    edit(folder / "config.json", lambda c: c["text_config"].update(num_hidden_layers=2))
    assert "9 weights are missing" in faults(folder)["weights"]


def test_a_tokenizer_of_another_model_is_named(folder: Path) -> None:
    edit(folder / "config.json", lambda c: c["text_config"].update(pad_token_id=0))
    assert "pad is 3 in the tokenizer and 0 in config.json" in faults(folder)["token ids"]


def test_a_folder_that_is_none_gets_one_finding(tmp_path: Path) -> None:
    (finding,) = examine(tmp_path / "nowhere")
    assert finding.is_fault
    assert "is not a folder" in finding.says


@torch.no_grad()
def test_the_mass_is_what_the_whole_softmax_gives_the_action_ids(valid: Path) -> None:
    policy = OpenVLAOFTPolicy.from_pretrained(valid)
    images = torch.randint(0, 256, (2, 1, 28, 28, 3), dtype=torch.uint8)
    prompts = [policy.processor.prompt(text) for text in ("lift it", "lift")]
    mass = policy.action_mass(images, prompts)
    assert mass.shape == (2, 56)
    assert 0 < mass.min() < mass.max() < 1
    config, head = policy.model.config, policy.model.language_model.lm_head
    head.weight.zero_()  # every id is as likely as every other
    chance = torch.full((2, 56), config.n_action_bins / config.language.vocab_size)
    assert torch.allclose(policy.action_mass(images, prompts), chance, atol=1e-6)


def test_a_head_that_never_learned_action_tokens_is_a_fault() -> None:
    assert judge_action_mass(torch.full((3, 56), 0.49)).is_fault
    finding = judge_action_mass(torch.full((3, 56), 0.98))
    assert not finding.is_fault
    assert "98.0%" in finding.says
    assert "3 images" in finding.says


def test_the_verb_answers_by_its_exit_code(
    valid: Path, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="verl_vla")
    assert verb.run(parse("doctor", ["--policy", str(valid)])) == 0
    assert "not measured" in caplog.text
    (folder / "tokenizer.json").unlink()
    assert verb.run(parse("doctor", ["--policy", str(folder)])) == verb.EXIT_FAULT
    assert "FAULT" in caplog.text


@pytest.mark.sim
def test_the_embedded_policy_is_sound_on_real_images(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="verl_vla")
    base = Path(__file__).resolve().parents[3] / "bases" / "mini"
    words = ["--policy", str(base), "--suite", "mini", "--images", "2", "--render-size", "128"]
    assert verb.run(parse("doctor", words)) == 0
    assert "on the action ids (2 images)" in caplog.text


def test_tasks_with_few_states_take_their_turns() -> None:
    """As in LIBERO-Plus, where most tasks have a single one."""
    by_task = [[Start(task_id=t, init_state_id=s) for s in range(n)] for t, n in ((0, 1), (1, 3))]
    seen = [(start.task_id, start.init_state_id) for start in in_turn(by_task)]
    assert seen == [(0, 0), (1, 0), (1, 1), (1, 2)]
