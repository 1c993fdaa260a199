"""Encoders with random weights in tiny sizes, read from a folder as real ones are."""

from __future__ import annotations

import os
import shutil
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import numpy as np
import pytest
import torch
from encoder_folders import (
    dinov2_processor,
    save_dinov2,
    save_siglip,
    save_vjepa2,
    smooth_images,
)
from safetensors.torch import load_file, save_file
from transformers import Dinov2WithRegistersModel, SiglipVisionModel

from verl_vla.core.errors import ConfigError, ContractError
from verl_vla.core.image_preprocessing import prepare_image
from verl_vla.core.tables import pick_by_time
from verl_vla.policies.normalization import ActionStatistics
from verl_vla.policies.openvla_oft.tiny import TinySizes, build_tiny_policy
from verl_vla.rewards.encoders import ENCODERS, make_encoder
from verl_vla.rewards.encoders.vjepa2 import pick_by_content

WIDTH = {"pixels": 16, "dinov2": 32, "siglip": 32, "vjepa2": 48, "policy_towers": 48}


def save_policy(folder) -> str:
    sizes = TinySizes(image_size=28, fused=True, vision_width=24, llm_width=32, llm_depth=1)
    statistics = ActionStatistics(q01=(-1.0,) * 7, q99=(1.0,) * 7, mask=(True,) * 6 + (False,))
    build_tiny_policy(["lift the cube"], statistics, sizes=sizes).model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def arguments(tmp_path_factory) -> dict[str, dict[str, Any]]:
    """What each encoder is made with."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("weights")
    exact = {"dtype": "float32"}
    return {
        "pixels": {"grid": 4},
        "dinov2": {"path": save_dinov2(root / "dino"), **exact},
        "siglip": {"path": save_siglip(root / "siglip"), **exact},
        "vjepa2": {"path": save_vjepa2(root / "vjepa"), **exact},
        "policy_towers": {"path": save_policy(root / "policy"), **exact},
    }


@pytest.fixture
def hub(arguments, monkeypatch, tmp_path):
    """A hub that cannot be reached, and what was fetched from it before: ``us/tiny-siglip``."""
    commit = "0" * 40
    model = tmp_path / "models--us--tiny-siglip"
    shutil.copytree(arguments["siglip"]["path"], model / "snapshots" / commit)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def test_weights_may_be_named_as_on_the_hub(hub, arguments):
    named = make_encoder("siglip", {**arguments["siglip"], "path": "us/tiny-siglip"})
    local = make_encoder("siglip", arguments["siglip"])
    assert named.feature_space == local.feature_space
    with pytest.raises(
        ConfigError, match=r"us/other is no folder here, and cannot be fetched from"
    ):
        make_encoder("siglip", {"path": "us/other"})


def clip(num_frames: int, seed: int = 0, size: int = 40) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 255, (num_frames, size, size, 3), dtype=np.uint8)


@pytest.mark.parametrize("name", ENCODERS)
def test_a_short_and_a_long_episode_together_give_what_each_gives_alone(name, arguments):
    encoder = make_encoder(name, {**arguments[name], "batch_size": 3})
    episodes = [clip(3, 1), clip(40, 2), clip(1, 3), clip(3, 4)]
    together = encoder.encode(episodes)
    for episode, features in zip(episodes, together, strict=True):
        (alone,) = encoder.encode([episode])
        rows = -(-len(episode) // 2) if name == "vjepa2" else len(episode)
        assert features.shape == (rows, WIDTH[name])
        assert features.dtype == np.float32
        np.testing.assert_allclose(features, alone, atol=1e-5)
    assert not np.allclose(together[0], together[3])


@pytest.mark.parametrize("name", ENCODERS)
def test_an_episode_without_images_has_no_rows_and_harms_nobody(name, arguments):
    encoder = make_encoder(name, arguments[name])
    empty, features = encoder.encode([clip(0), clip(4)])
    assert len(empty) == 0 and len(features)
    assert len(encoder.encode([clip(0)])[0]) == 0
    assert encoder.encode([]) == []


@pytest.mark.parametrize("name", ENCODERS)
def test_what_is_no_image_is_refused(name, arguments):
    encoder = make_encoder(name, arguments[name])
    with pytest.raises(ContractError, match=r"of episode 1 must be uint8 \[T, H, W, 3\], got fl"):
        encoder.encode([clip(2), clip(2).astype(np.float32)])


@pytest.mark.parametrize("name", ["dinov2", "siglip", "vjepa2", "policy_towers"])
def test_a_feature_space_is_named_after_weights_dtype_and_settings(name, arguments, tmp_path):
    own = arguments[name]
    space = make_encoder(name, own).feature_space
    assert make_encoder(name, {**own, "batch_size": 1}).feature_space == space
    assert make_encoder(name, {**own, "dtype": "bfloat16"}).feature_space != space
    torch.manual_seed(1)
    assert make_encoder(name, {**own, "path": FRESH[name](tmp_path)}).feature_space != space


def save_other_policy(folder) -> str:
    sizes = TinySizes(image_size=28, fused=True, vision_width=24, llm_width=32, llm_depth=1)
    statistics = ActionStatistics(q01=(-1.0,) * 7, q99=(1.0,) * 7, mask=(True,) * 6 + (False,))
    policy = build_tiny_policy(["lift the cube"], statistics, sizes=sizes, seed=1)
    policy.model.save_pretrained(folder)
    return str(folder)


FRESH = {
    "dinov2": save_dinov2,
    "siglip": save_siglip,
    "vjepa2": save_vjepa2,
    "policy_towers": save_other_policy,
}


def test_an_encoder_in_a_process_of_its_own_gives_the_same_and_may_be_lost(arguments):
    here = make_encoder("siglip", arguments["siglip"])
    beside: Any = make_encoder("siglip", {**arguments["siglip"], "own_process": True})
    assert beside.feature_space == here.feature_space
    episodes = [clip(3, 1), clip(0), clip(2, 2)]
    for mine, theirs in zip(here.encode(episodes), beside.encode(episodes), strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-6)
    (process,) = beside._pool._processes.values()
    assert process.pid != os.getpid()
    process.kill()
    with pytest.raises(BrokenProcessPool):
        beside.encode(episodes)


def test_pixels_are_the_means_of_a_grid():
    image = np.zeros((1, 5, 6, 3), dtype=np.uint8)
    image[0, 2:, 3:] = (255, 0, 0)
    assert make_encoder("pixels", {"grid": 2}).encode([image])[0].tolist() == [
        [0.0, 0.0, 0.0, pytest.approx(1 / 3)]
    ]
    colour = make_encoder("pixels", {"grid": 2, "colour": True})
    assert colour.encode([image])[0][0, -3:].tolist() == [1.0, 0.0, 0.0]
    with pytest.raises(ContractError, match="images of 5 x 6 px have no 8 x 8 cells"):
        make_encoder("pixels", {"grid": 8}).encode([image])


def test_dinov2_with_registers_leaves_them_out(tmp_path):
    torch.manual_seed(0)
    path = save_dinov2(tmp_path, registers=4)
    encoder = make_encoder("dinov2", {"path": path, "dtype": "float32"})
    image = clip(2, size=28)
    pixels = dinov2_processor(28)(list(image), return_tensors="pt")["pixel_values"]
    model: Any = Dinov2WithRegistersModel.from_pretrained(path)
    with torch.no_grad():
        expected = model.eval()(pixel_values=pixels).last_hidden_state[:, 5:].mean(1)
    np.testing.assert_allclose(encoder.encode([image])[0], expected, atol=1e-4)


def test_siglip_is_read_before_its_last_block(arguments):
    image = clip(2, size=28)
    model = SiglipVisionModel.from_pretrained(arguments["siglip"]["path"])
    pixels = torch.from_numpy(image).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        states = model(pixel_values=pixels, output_hidden_states=True).hidden_states
    expected = states[2].mean(1)
    found = make_encoder("siglip", arguments["siglip"]).encode([image])[0]
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_the_policys_towers_see_images_as_the_policy_does(arguments):
    encoder = make_encoder("policy_towers", arguments["policy_towers"])
    rendered = smooth_images(3, 40, 40).numpy()
    seen = np.stack([prepare_image(image, size=28) for image in rendered])
    (of_video,), (of_policy,) = encoder.encode([rendered]), encoder.encode([seen])
    assert np.array_equal(of_video, of_policy)


def test_the_policys_towers_are_those_of_its_checkpoint(arguments):
    own = arguments["policy_towers"]
    both, first, last = (
        make_encoder("policy_towers", {**own, "tower": t}).encode([clip(2)])[0]
        for t in ("all", "first", "last")
    )
    np.testing.assert_allclose(both, np.concatenate([first, last], axis=1), atol=1e-6)
    spaces = {
        make_encoder("policy_towers", {**own, "tower": t}).feature_space for t in ("all", "last")
    }
    assert len(spaces) == 2


def test_scrambled_towers_have_the_same_numbers_in_another_order(arguments):
    own = arguments["policy_towers"]
    plain, one, same, other = (
        make_encoder("policy_towers", {**own, **extra})
        for extra in ({}, *({"scramble_seed": seed} for seed in (1, 1, 2)))
    )
    assert one.feature_space == same.feature_space
    assert len({e.feature_space for e in (plain, one, other)}) == 3
    (features,), (repeated,) = one.encode([clip(2)]), same.encode([clip(2)])
    assert np.array_equal(features, repeated)
    assert not np.allclose(features, plain.encode([clip(2)])[0])
    for name, weight in plain.network.module.state_dict().items():
        mixed = one.network.module.state_dict()[name]
        assert torch.equal(weight.flatten().sort().values, mixed.flatten().sort().values)


def test_vjepa2_knows_the_order_of_frames_and_never_loops_a_clip(arguments):
    encoder = make_encoder("vjepa2", arguments["vjepa2"])
    episode = clip(6)
    straight, backwards = encoder.encode([episode, episode[::-1]])
    assert not np.allclose(straight.mean(0), backwards.mean(0), atol=1e-5)
    odd, completed = encoder.encode([episode[:3], episode[[0, 1, 2, 2]]])
    np.testing.assert_allclose(odd, completed, atol=1e-6)
    thinned = make_encoder("vjepa2", {**arguments["vjepa2"], "max_frames": 4})
    assert thinned.encode([clip(40)])[0].shape == (2, 48)


def test_vjepa2_thins_by_time_unless_asked_to_by_content(arguments):
    """Ten frames that change, then thirty that stand still, four of them kept."""
    episode = np.concatenate([clip(10, 1), np.repeat(clip(1), 30, axis=0)])
    assert pick_by_time(len(episode), 4).tolist() == [0, 13, 26, 39]
    assert pick_by_time(3, 4).tolist() == [0, 1, 2]
    four = {**arguments["vjepa2"], "max_frames": 4}
    by_time, by_content = (
        make_encoder("vjepa2", {**four, "thin_by": way}) for way in ("time", "content")
    )
    assert by_time.feature_space == make_encoder("vjepa2", four).feature_space
    assert by_time.feature_space != by_content.feature_space
    whole = make_encoder("vjepa2", arguments["vjepa2"])
    for encoder, kept in (
        (by_time, pick_by_time(len(episode), 4)),
        (by_content, pick_by_content(episode, 4)),
    ):
        np.testing.assert_allclose(
            encoder.encode([episode])[0], whole.encode([episode[kept]])[0], atol=1e-5
        )
    with pytest.raises(ConfigError, match="thin_by is 'change'; choose 'time' or 'content'"):
        make_encoder("vjepa2", {**four, "thin_by": "change"})


def test_frames_are_picked_where_the_image_changes():
    still = np.repeat(clip(1), 30, axis=0)
    episode = np.concatenate([clip(10, 1), still])
    picked = pick_by_content(episode, 8)
    assert picked[0] == 0 and picked[-1] >= 10 and (picked < 11).sum() >= 6
    assert pick_by_content(episode, 64).tolist() == list(range(40))
    assert len(pick_by_content(still, 8)) == 8


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("dino", {}, "encoder is 'dino'; did you mean 'dinov2'?"),
        ("dinov2", {}, "encoder 'dinov2' needs 'path'; set reward_args.encoder_args.path"),
        ("pixels", {"gird": 3}, "encoder 'pixels' has no argument 'gird'; did you mean 'grid'?"),
        ("pixels", {"grid": 0}, "grid is 0; set at least 1"),
        ("pixels", {"batch_size": 0}, "batch_size is 0; set at least 1"),
        ("siglip", {"path": "nowhere"}, "nowhere holds no config.json; point encoder_args.path"),
    ],
)
def test_an_encoder_that_cannot_be_made_is_refused(name, change, message):
    with pytest.raises(ConfigError) as caught:
        make_encoder(name, change)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("name", "of", "change", "message"),
    [
        ("dinov2", "siglip", {}, "encoder dinov2 needs DINOv2"),
        ("siglip", "dinov2", {}, "encoder siglip needs SigLIP"),
        ("vjepa2", "siglip", {}, "encoder vjepa2 needs V-JEPA 2"),
        ("siglip", "siglip", {"dtype": "int8"}, "dtype is 'int8'; choose one of float32"),
        ("siglip", "siglip", {"device": "warp"}, "device is 'warp', which cannot be used"),
        ("policy_towers", "policy_towers", {"tower": "mid"}, "tower is 'mid'; choose"),
    ],
)
def test_another_model_or_setting_is_refused(name, of, change, message, arguments):
    with pytest.raises(ConfigError, match=message):
        make_encoder(name, {"path": arguments[of]["path"], **change})


@pytest.mark.parametrize("name", ["dinov2", "siglip", "vjepa2", "policy_towers"])
def test_an_encoder_is_checked_at_once_and_read_when_it_is_used(name, arguments):
    encoder: Any = make_encoder(name, arguments[name])
    assert not encoder.network.is_read
    encoder.encode([clip(2)])
    assert encoder.network.is_read


def cut_off(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])


def without_one(folder):
    weights = load_file(folder / "model.safetensors")
    save_file(dict(list(weights.items())[:-1]), folder / "model.safetensors", {"format": "pt"})


def with_another_shape(folder):
    weights = load_file(folder / "model.safetensors")
    longer = {name: weight.repeat(2) for name, weight in weights.items() if weight.ndim == 1}
    save_file(weights | longer, folder / "model.safetensors", {"format": "pt"})


def without_weights(folder):
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize("name", ["dinov2", "siglip", "vjepa2", "policy_towers"])
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (cut_off, "is cut off or no safetensors file"),
        (without_one, "1 missing keys of|is absent in the files"),
        (with_another_shape, "mismatched keys of|do not fit its config"),
        (without_weights, r"holds neither model\.safetensors nor"),
    ],
)
def test_bad_weights_are_refused_before_any_is_read(name, spoil, message, arguments, tmp_path):
    folder = tmp_path / "folder"
    shutil.copytree(arguments[name]["path"], folder)
    before = torch.get_rng_state()
    make_encoder(name, {**arguments[name], "path": str(folder)})
    spoil(folder)
    with pytest.raises(ConfigError, match=message):
        make_encoder(name, {**arguments[name], "path": str(folder)})
    assert torch.equal(torch.get_rng_state(), before), "nothing was filled with random numbers"


def test_a_device_that_this_machine_lacks_is_refused(arguments):
    with pytest.raises(ConfigError, match="torch finds 0 of 'cuda' here; set auto or cpu"):
        make_encoder("siglip", {**arguments["siglip"], "device": "cuda"})
    for device in ("auto", "cpu"):
        encoder: Any = make_encoder("siglip", {**arguments["siglip"], "device": device})
        assert str(encoder.network.device) == "cpu"
