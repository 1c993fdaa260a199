"""The model of a scratch VLA: its two decodings, its masks, and what it trains."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, Qwen2Config

from verl_vla.core.errors import ConfigError, ContractError
from verl_vla.policies.action_distribution import log_prob
from verl_vla.policies.base import ActionSampler
from verl_vla.policies.scratch_vla import ScratchVLAConfig, ScratchVLAModel
from verl_vla.policies.scratch_vla.tiny import ScratchSizes, tiny_config

NUM_WORDS = 20
SMALL = ScratchSizes(
    image_size=28,
    vision_width=24,
    vision_depth=1,
    llm_width=32,
    llm_depth=2,
    llm_mlp=64,
    chunk_length=2,
    action_dim=3,
)
IN_TURN = replace(SMALL, decoding="autoregressive")
BOTH = pytest.mark.parametrize("sizes", [SMALL, IN_TURN], ids=["parallel", "autoregressive"])


def make_model(sizes: ScratchSizes = SMALL) -> ScratchVLAModel:
    torch.manual_seed(0)
    return ScratchVLAModel(tiny_config(NUM_WORDS, sizes)).eval()


def make_inputs(model: ScratchVLAModel, lengths: list[int]) -> dict[str, Tensor]:
    """Random pixels, bins, and right-padded prompts of the given lengths."""
    generator = torch.Generator().manual_seed(1)
    config = model.config
    size = config.shape.image_size
    channels = 3 * len(config.towers) * config.num_views
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    ids = torch.randint(4, NUM_WORDS, mask.shape, generator=generator)
    return {
        "pixel_values": torch.randn(len(lengths), channels, size, size, generator=generator),
        "input_ids": ids.where(mask, 3),
        "attention_mask": mask.long(),
        "action_tokens": torch.randint(
            0, 256, (len(lengths), config.num_action_tokens), generator=generator
        ),
    }


def pick(inputs: dict[str, Tensor], row: int, length: int) -> dict[str, Tensor]:
    """One row of the inputs, without its padding."""
    one = {name: value[row : row + 1] for name, value in inputs.items()}
    cut = {name: one[name][:, :length] for name in ("input_ids", "attention_mask")}
    return one | cut


@BOTH
def test_logits_cover_every_action_token_and_bin(sizes: ScratchSizes) -> None:
    model = make_model(replace(sizes, num_towers=2, num_views=2))
    logits = model(**make_inputs(model, [5, 5])).logits
    assert logits.shape == (2, 6, 256) and logits.dtype == torch.float32


@BOTH
def test_a_batch_of_different_prompts_equals_each_alone(sizes: ScratchSizes) -> None:
    model, lengths = make_model(sizes), [9, 4, 6]
    inputs = make_inputs(model, lengths)
    together = model(**inputs).logits
    for row, length in enumerate(lengths):
        alone = model(**pick(inputs, row, length)).logits
        assert (alone - together[row : row + 1]).abs().max() < 1e-4


@BOTH
@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_who_sees_whom(sizes: ScratchSizes, backend: str) -> None:
    """All see all in parallel decoding; nobody sees what comes after in the other one."""
    model = make_model(sizes)
    model.set_attn_implementation(backend)
    inputs = make_inputs(model, [5])
    inputs["input_ids"][0, -1] = 7
    hidden: list[Tensor] = []
    model.language_model.norm.register_forward_hook(lambda *call: hidden.append(call[2]))
    with torch.no_grad():
        model(**inputs)
        inputs["input_ids"][0, -1] = 8
        model(**inputs)
    moved = (hidden[0] - hidden[1]).abs().amax(-1)[0]
    last_word = model.config.num_patches + 4
    assert moved[last_word:].min() > 1e-4
    if sizes is SMALL:
        assert moved[:last_word].min() > 1e-4
    else:
        assert moved[:last_word].max() == 0


def test_a_token_is_given_the_tokens_before_it_and_no_others() -> None:
    model = make_model(IN_TURN)
    inputs = make_inputs(model, [5, 3])
    first = model(**inputs).logits
    inputs["action_tokens"][:, 2] = (inputs["action_tokens"][:, 2] + 100) % 256
    second = model(**inputs).logits
    assert torch.equal(first[:, :3], second[:, :3])
    assert (first[:, 3:] - second[:, 3:]).abs().amax(-1).min() > 1e-4


def test_parallel_decoding_leaves_bins_alone() -> None:
    model = make_model()
    inputs = make_inputs(model, [5, 3])
    with_bins = model(**inputs).logits
    del inputs["action_tokens"]
    assert torch.equal(with_bins, model(**inputs).logits)


@pytest.mark.parametrize("temperature", [0.0, 1.0, 1.6])
def test_choosing_in_turn_gives_the_logits_of_scoring(temperature: float) -> None:
    model = make_model(IN_TURN)
    inputs = make_inputs(model, [9, 4, 6])
    del inputs["action_tokens"]
    noise = torch.rand(3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        chosen = model(**inputs, sampler=ActionSampler(noise, temperature))
        scored = model(**inputs, action_tokens=chosen.action_tokens)
    assert (chosen.logits - scored.logits).abs().max() < 1e-5
    if temperature == 0:
        assert torch.equal(chosen.action_tokens, scored.logits.argmax(-1))


def test_autoregressive_decoding_wants_bins_or_a_chooser() -> None:
    model = make_model(IN_TURN)
    inputs = make_inputs(model, [5])
    sampler = ActionSampler(torch.zeros(1, 6, dtype=torch.float64), 1.0)
    with pytest.raises(ContractError, match="either bins or a sampler"):
        model(**inputs, sampler=sampler)
    del inputs["action_tokens"]
    with pytest.raises(ContractError, match="either bins or a sampler"):
        model(**inputs)


@BOTH
def test_demonstrated_bins_are_scored_among_the_action_rows(sizes: ScratchSizes) -> None:
    model = make_model(sizes)
    inputs = make_inputs(model, [5, 3])
    output = model(**inputs, with_nll=True)
    expected = -log_prob(model(**inputs).logits, inputs["action_tokens"], 1.0)
    assert output.nll.shape == (2, model.config.num_action_tokens)
    assert torch.allclose(output.nll, expected, atol=1e-6)
    assert model(**inputs).nll is None
    output.nll.sum().backward()
    head = model.action_tokens.head.weight.grad
    assert head is not None
    assert (head.abs().sum(1) > 0).all(), "every bin that was not demonstrated is pushed down"


@BOTH
def test_gradient_checkpointing_changes_no_gradient(sizes: ScratchSizes) -> None:
    def gradients(checkpointing: bool) -> list[Tensor]:
        model = make_model(replace(sizes, lora_rank=2)).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(**make_inputs(model, [5, 3])).logits.square().mean().backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    plain, again = gradients(False), gradients(True)
    assert len(plain) == len(again) > 0
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(plain, again, strict=True))


def test_adapters_and_action_rows_are_trained_and_the_language_model_is_not() -> None:
    config = tiny_config(NUM_WORDS, replace(SMALL, lora_rank=2))
    config.train_vision = False
    trained = {n for n, p in ScratchVLAModel(config).named_parameters() if p.requires_grad}
    assert {"action_tokens.embedding.weight", "action_tokens.head.weight"} <= trained
    assert "projector.fc1.weight" in trained
    assert any("lora_A" in name for name in trained)
    assert not any("base_layer" in name or name.startswith("vision") for name in trained)


def test_an_adapter_changes_nothing_before_it_is_trained() -> None:
    plain, adapted = make_model(), make_model(replace(SMALL, lora_rank=2))
    inputs = make_inputs(plain, [5])
    assert torch.equal(plain(**inputs).logits, adapted(**inputs).logits)


def test_a_frozen_tied_head_works_and_warns(caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("verl_vla").propagate = True
    with caplog.at_level(logging.WARNING, "verl_vla"):
        model = make_model(replace(IN_TURN, action_rows="frozen_tied"))
    assert "29% of the tokens" in caplog.text
    assert not model.get_input_embeddings().weight.requires_grad
    assert not any("action_tokens" in name for name, _ in model.named_parameters())
    inputs = make_inputs(model, [5])
    first = model(**inputs).logits
    with torch.no_grad():
        model.get_input_embeddings().weight[NUM_WORDS + 200] += 1
    moved = (model(**inputs).logits - first).abs().amax((0, 1))
    assert int(moved.argmax()) == 200


def test_any_causal_language_model_will_do() -> None:
    config = ScratchVLAConfig(
        text_config=LlamaConfig(
            vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
            num_attention_heads=2,
        ),
        vision_config=tiny_config(NUM_WORDS, SMALL).towers[0],
        decoding="autoregressive",
        chunk_length=1,
    )  # fmt: skip
    model = ScratchVLAModel(config).eval()
    assert config.first_action_id == 300 - 256
    assert model(**make_inputs(model, [5, 3])).logits.shape == (2, 7, 256)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"decoding": "diffusion"}, "decoding is 'diffusion'; choose one of"),
        ({"action_rows": "tied"}, "action_rows is 'tied'; choose one of"),
        ({"action_rows": "frozen_tied"}, "only a head that is its embedding"),
        ({"num_views": 3}, "one or two cameras"),
        ({"lora_rank": -1}, "lora_rank is -1; it must be at least 0"),
        ({"text_config": {"vocab_size": 10}}, "names no model_type"),
        ({"first_action_id": -1}, "action ids would run from -1"),
    ],
)
def test_impossible_parts_are_refused(change: dict[str, object], says: str) -> None:
    parts = {"text_config": Qwen2Config(vocab_size=300)} | change
    with pytest.raises(ConfigError, match=says):
        ScratchVLAConfig(**parts)


def test_towers_of_different_images_are_refused() -> None:
    tower = tiny_config(NUM_WORDS, SMALL).towers[0].to_dict()
    with pytest.raises(ConfigError, match="take towers of one image and patch size"):
        ScratchVLAConfig(vision_config=tower, second_vision_config=tower | {"image_size": 56})


def test_a_back_end_that_ignores_the_mask_is_refused() -> None:
    config = tiny_config(NUM_WORDS, SMALL)
    config.language._attn_implementation = "flash_attention_2"
    with pytest.raises((ConfigError, ImportError)):
        ScratchVLAModel(config)


def test_a_prompt_that_is_too_long_is_refused() -> None:
    config = tiny_config(NUM_WORDS, SMALL)
    config.language.max_position_embeddings = 12
    model = ScratchVLAModel(config)
    with pytest.raises(ContractError, match="make a sequence of 14"):
        model(**make_inputs(model, [5]))
