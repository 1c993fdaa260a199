from __future__ import annotations

import numpy as np
import torch

from verl_vla.envs.libero.suite import PERTURBED
from verl_vla.envs.registry import suite
from verl_vla.policies.normalization import ActionStatistics
from verl_vla.policies.openvla_oft import OpenVLAOFTPolicy
from verl_vla.policies.openvla_oft.tiny import (
    TinySizes,
    build_tiny_policy,
    build_tokenizer,
    tiny_config,
)
from verl_vla.policies.preprocessing import EMPTY_PIECE, prompt_ids

INSTRUCTIONS = ["push the cube onto the marker", "lift the cube"]
STATISTICS = ActionStatistics(
    q01=[-0.6, -0.6, 0.0], q99=[0.7, 0.7, 1.0], mask=[True, True, False], key="mini"
)
SMALL = TinySizes(
    image_size=28, patch_size=7, vision_width=24, llm_width=32, llm_depth=2, llm_mlp=64,
    chunk_length=2, action_dim=3,
)  # fmt: skip


def parameters(policy: OpenVLAOFTPolicy) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in policy.model.parameters()])


def test_words_come_behind_the_special_pieces_in_a_fixed_order() -> None:
    tokenizer = build_tokenizer(INSTRUCTIONS)
    assert tokenizer.convert_ids_to_tokens(list(range(5))) == [
        "<unk>", "<s>", "</s>", "<pad>", EMPTY_PIECE,
    ]  # fmt: skip
    words = tokenizer.convert_ids_to_tokens(list(range(5, len(tokenizer))))
    assert words == sorted(words) and {"cube", "push", "In", "?", "Out"} <= set(words)
    assert build_tokenizer(INSTRUCTIONS[::-1]).get_vocab() == tokenizer.get_vocab()


def test_words_of_other_instructions_are_spelled() -> None:
    tokenizer = build_tokenizer(INSTRUCTIONS)
    spelled = {
        "cubes": ["cube", "##s"],
        "the robot’s entrée": ["the", "robot", "’", "s", "e", "##n", "##t", "##r", "##e", "##e"],
        "cube_7.": ["cube", "_", "7", "."],
    }
    for sentence, pieces in spelled.items():
        assert tokenizer.convert_ids_to_tokens(tokenizer.encode(sentence)) == ["<s>", *pieces]


def test_every_sentence_of_the_perturbed_suites_can_be_read() -> None:
    tokenizer = build_tokenizer([task.instruction for task in suite("libero_spatial").tasks])
    # few different ones: most variants of a task share its sentence, and suites share variants
    for sentence in {task.instruction for name in PERTURBED for task in suite(name).tasks}:
        assert tokenizer.unk_token_id not in prompt_ids(tokenizer, sentence)


def test_action_ids_lie_between_the_words_and_the_padding() -> None:
    for count in (1, 40, 41, 43, 60):
        tokenizer = build_tokenizer([" ".join(f"w{i}" for i in range(count))])
        config = tiny_config(tokenizer, TinySizes())
        assert config.first_action_id >= len(tokenizer)
        assert config.first_action_id + 256 + config.pad_to_multiple_of == (
            config.language.vocab_size
        )
        assert config.language.vocab_size % 64 == 0


def test_the_default_sizes_are_the_ones_that_are_known_to_learn() -> None:
    statistics = ActionStatistics(q01=[-1.0] * 6 + [0.0], q99=[1.0] * 7, mask=[True] * 6 + [False])
    policy = build_tiny_policy(INSTRUCTIONS, statistics)
    trainable = sum(p.numel() for p in policy.model.parameters() if p.requires_grad)
    assert 700_000 < trainable < 800_000
    assert policy.model.config.num_patches == 64
    assert (policy.shape.chunk_length, policy.shape.action_dim) == (8, 7)


def test_the_seed_decides_the_weights_and_leaves_the_random_state_alone() -> None:
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    first = build_tiny_policy(INSTRUCTIONS, STATISTICS, sizes=SMALL, seed=1)
    assert torch.equal(torch.rand(1), expected)
    again = build_tiny_policy(INSTRUCTIONS, STATISTICS, sizes=SMALL, seed=1)
    other = build_tiny_policy(INSTRUCTIONS, STATISTICS, sizes=SMALL, seed=2)
    assert torch.equal(parameters(first), parameters(again))
    assert not torch.equal(parameters(first), parameters(other))


def test_it_learns_what_it_sees_and_what_it_is_told() -> None:
    """One image and instruction decide the direction, another pair the other one."""
    policy = build_tiny_policy(INSTRUCTIONS, STATISTICS, sizes=SMALL)
    images = torch.zeros(4, 1, 28, 28, 3, dtype=torch.uint8)
    images[1::2, 0, 14:] = 255
    prompts = [policy.processor.prompt(INSTRUCTIONS[row // 2]) for row in range(4)]
    signs = np.array([1, -1, -1, 1])[:, None, None]  # neither alone tells
    actions = np.broadcast_to(0.5 * signs, (4, 2, 3)) * [1, 1, 2]
    action_tokens = policy.processor.codec.from_simulator(actions)
    trainable = [p for p in policy.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=3e-3)
    for _ in range(250):
        loss = -policy.log_prob(images, prompts, action_tokens, temperature=1.0).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if loss.item() < 0.1:
            break
    assert loss.item() < 0.1
    chosen = policy.logits(images, prompts).argmax(-1)
    assert torch.equal(chosen, action_tokens)
