"""The bugs that a first VLA had, each of which ran in silence or lost hours.

Source: "A VLA from scratch: 29% tokens, 0% grasps, and a GRPO that wouldn't budge". Two more of its
six, an epoch lost without step checkpoints and an HDF5 handle carried across a fork, are bugs of
fine-tuning and are tested with it.
"""

from __future__ import annotations

import pytest
import torch

from verl_vla.config.grpo import ClipRange
from verl_vla.core.errors import ConfigError, ContractError
from verl_vla.policies.action_distribution import log_prob
from verl_vla.policies.scratch_vla import ScratchVLAConfig, ScratchVLAModel
from verl_vla.policies.scratch_vla.action_tokens import embed_action_tokens, find_first_action_id
from verl_vla.policies.scratch_vla.tiny import ScratchSizes, tiny_config
from verl_vla.rl.loss import policy_loss

NUM_BINS = 256
SIZES = ScratchSizes(
    image_size=28,
    vision_width=24,
    vision_depth=1,
    llm_width=32,
    llm_depth=1,
    llm_mlp=64,
    chunk_length=1,
    decoding="autoregressive",
)


def vocabulary(*, words: int, padding: int) -> torch.Tensor:
    """Rows of a trained vocabulary, and padding as Qwen2.5 has it: alike but for 6e-5."""
    generator = torch.Generator().manual_seed(0)
    rows = 0.02 * torch.randn(words + padding, 32, generator=generator)
    if padding:
        rows[words:] = rows[words] + 6e-5 * torch.rand(padding, 32, generator=generator)
    return rows


def test_action_ids_out_of_range_are_refused() -> None:
    """``offset = number of rows`` starts one past the end; a GPU reads other memory there."""
    parts = tiny_config(20, SIZES).to_dict()
    with pytest.raises(ConfigError, match=r"would run from 276 to 531, .* has rows 0 to 275"):
        ScratchVLAConfig(**parts | {"first_action_id": parts["text_config"]["vocab_size"]})
    with pytest.raises(ContractError, match=r"tokens run from 0 to 256; only 0\.\.255 exist"):
        embed_action_tokens(torch.zeros(NUM_BINS, 4), torch.tensor([[0, NUM_BINS]]))


def test_action_tokens_keep_off_identical_padding_rows() -> None:
    """``offset = rows - 256`` lands on padding, whose bins no head can tell apart."""
    rows = vocabulary(words=300, padding=292)
    first = find_first_action_id(rows, NUM_BINS)
    assert first == 300 - NUM_BINS
    last, chosen = rows[-NUM_BINS:], rows[first : first + NUM_BINS]
    assert (last - last[0]).abs().max() < 1e-3  # where the obvious fix would have put them
    assert torch.pdist(chosen).min() > 1e-3


def test_a_vocabulary_without_padding_gives_its_last_rows() -> None:
    assert find_first_action_id(vocabulary(words=300, padding=0), NUM_BINS) == 44


def test_too_few_or_repeated_words_are_refused() -> None:
    with pytest.raises(ConfigError, match="100 rows before its padding"):
        find_first_action_id(vocabulary(words=100, padding=200), NUM_BINS)
    rows = vocabulary(words=300, padding=10)
    rows[150] = rows[200]
    with pytest.raises(ConfigError, match="rows 150 and 200 of the vocabulary are alike"):
        find_first_action_id(rows, NUM_BINS)


@pytest.mark.parametrize("autocast", [False, True])
def test_a_float32_projector_meets_a_bfloat16_language_model(autocast: bool) -> None:
    """Autocast hid the two types while training; play and evaluation had no autocast."""
    model = ScratchVLAModel(tiny_config(20, SIZES)).to(torch.bfloat16).eval()
    model.projector.float()
    seen: list[torch.dtype] = []
    model.language_model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["inputs_embeds"].dtype), with_kwargs=True
    )
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits = model(
            torch.randn(1, 3, 28, 28),
            torch.tensor([[5, 6]]),
            action_tokens=torch.zeros(1, 7).long(),
        ).logits
    assert seen == [torch.bfloat16]
    assert logits.dtype == torch.float32 and logits.isfinite().all()


def test_autocast_does_not_change_the_type_of_a_float32_model() -> None:
    model = ScratchVLAModel(tiny_config(20, SIZES)).eval()
    seen: list[torch.dtype] = []
    model.language_model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["inputs_embeds"].dtype), with_kwargs=True
    )
    with torch.autocast("cpu", torch.bfloat16):
        model(
            torch.randn(1, 3, 28, 28),
            torch.tensor([[5, 6]]),
            action_tokens=torch.zeros(1, 7).long(),
        )
    assert seen == [torch.float32]


def test_zero_times_minus_infinity_is_kept_out_of_loss_and_gradient() -> None:
    """``log_probs * mask`` is NaN where a token outside the mask has probability zero."""
    logits = torch.zeros(1, 2, 4)
    logits[0, 1, 3] = -torch.inf
    logits.requires_grad_(True)
    action_tokens = torch.tensor([[0, 3]])
    plain = logits.log_softmax(-1).gather(-1, action_tokens[..., None])[..., 0]
    assert plain[0, 1] == -torch.inf
    assert torch.isnan(plain * torch.tensor([[1.0, 0.0]])).any()  # the bug
    log_probs = log_prob(logits, action_tokens, temperature=1.0)
    assert log_probs.isfinite().all()
    parts = policy_loss(
        log_probs,
        log_probs.detach(),
        torch.ones(1),
        torch.tensor([[True, False]]),
        torch.ones(1),
        ClipRange(),
    )
    parts.loss.backward()
    assert parts.loss.isfinite()
    assert logits.grad is not None and logits.grad.isfinite().all()
