"""The loss of fine-tuning: what OpenVLA-OFT answers to demonstrated bins."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from verl_vla.policies.openvla_oft import OpenVLAOFTModel
from verl_vla.policies.openvla_oft.tiny import TinySizes, build_tokenizer, tiny_config

PLAIN = TinySizes(
    image_size=28, vision_width=24, llm_width=32, llm_depth=2, llm_mlp=64, chunk_length=4
)
FUSED = replace(PLAIN, fused=True, num_views=2)
PAD = 3

LENGTHS = [9, 12, 7]


def make_model(sizes: TinySizes, seed: int = 0) -> OpenVLAOFTModel:
    torch.manual_seed(seed)
    return OpenVLAOFTModel(tiny_config(build_tokenizer(["lift the cube"]), sizes))


def make_inputs(model: OpenVLAOFTModel, lengths: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Random pixels and right-padded prompts of the given lengths."""
    generator = torch.Generator().manual_seed(1)
    config = model.config
    channels = 3 * len(config.towers) * config.num_images_in_input
    shape = (len(lengths), channels, config.image_size, config.image_size)
    pixels = torch.randn(shape, generator=generator)
    ids = torch.randint(4, 20, (len(lengths), max(lengths)), generator=generator)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return pixels, ids.where(mask, PAD), mask.long()


def demonstrated(model: OpenVLAOFTModel, num: int) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randint(0, 256, (num, model.config.num_action_tokens), generator=generator)


def test_labels_are_the_action_ids_and_the_stop_among_the_whole_vocabulary() -> None:
    """openvla-oft: 56 action labels and `</s>`, each read one place before its token."""
    model = make_model(PLAIN)
    pixels, ids, _ = make_inputs(model, [9, 9])
    action_tokens = demonstrated(model, 2)
    seen: list[Tensor] = []
    model.language_model.model.register_forward_hook(lambda _, __, out: seen.append(out[0]))
    output = model(pixels, ids, None, action_tokens, with_nll=True)
    (hidden,) = seen
    num_patches = hidden.shape[1] - 9 - model.config.num_action_tokens - 1
    first = num_patches + 9 - 1
    everything = model.language_model.lm_head(hidden[:, first:-1])
    labels = torch.cat([model.config.first_action_id + action_tokens, torch.full((2, 1), 2)], dim=1)
    assert model.config.stop_id == 2
    wanted = -torch.log_softmax(everything, -1).gather(-1, labels[..., None])[..., 0]
    assert output.nll.shape == (2, model.config.num_action_tokens + 1)
    assert torch.allclose(output.nll, wanted, atol=1e-5)
    assert torch.allclose(output.logits, model.action_logits(pixels, ids), atol=1e-6)


def test_prompts_of_different_lengths_are_scored_as_alone() -> None:
    model = make_model(PLAIN)
    pixels, ids, mask = make_inputs(model, LENGTHS)
    action_tokens = demonstrated(model, 3)
    together = model(pixels, ids, mask, action_tokens, with_nll=True).nll
    for row, length in enumerate(LENGTHS):
        part = slice(row, row + 1)
        alone = model(
            pixels[part], ids[part, :length], None, action_tokens[part], with_nll=True
        ).nll
        assert torch.allclose(together[part], alone, atol=1e-4)


def test_the_gradient_reaches_every_weight_that_runs() -> None:
    model = make_model(FUSED)
    pixels, ids, mask = make_inputs(model, LENGTHS)
    model(pixels, ids, mask, demonstrated(model, 3), with_nll=True).nll.sum().backward()
    idle = [
        name
        for name, weight in model.named_parameters()
        if weight.requires_grad and (weight.grad is None or not weight.grad.any())
    ]
    assert idle == []
    head = model.language_model.lm_head.weight.grad
    assert head is not None
    assert (head.abs().sum(1) > 0).all(), "every word of the vocabulary is pushed down"


def test_logits_of_other_positions_are_never_made(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(PLAIN)
    sizes: list[int] = []
    linear = functional.linear

    def watched(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if len(weight) == model.config.language.vocab_size:
            sizes.append(x.shape[1])
        return linear(x, weight, bias)

    monkeypatch.setattr(functional, "linear", watched)
    pixels, ids, mask = make_inputs(model, LENGTHS)
    model(pixels, ids, mask, demonstrated(model, 3), with_nll=True)
    assert sizes == [model.config.num_action_tokens + 1]
    sizes.clear()
    model.action_logits(pixels, ids, mask)
    assert sizes == []
