"""Adapters of both architectures: where they stand, what they learn, and how they are merged."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor
from transformers import AutoModel

from verl_vla.policies.lora import MakeWeight, add_adapters, merge_adapters, without_adapters
from verl_vla.policies.openvla_oft import OpenVLAOFTConfig, OpenVLAOFTModel
from verl_vla.policies.openvla_oft import tiny as tiny_openvla_oft
from verl_vla.policies.quantization import plain_weights, quantize_under_adapters
from verl_vla.policies.scratch_vla import ScratchVLAModel
from verl_vla.policies.scratch_vla import tiny as tiny_scratch_vla
from verl_vla.policies.token_model import TokenModel

NUM_WORDS = 20
TOKENIZER = tiny_openvla_oft.build_tokenizer(["lift the cube"])
SMALL = {"image_size": 28, "vision_width": 24, "llm_width": 32, "llm_depth": 2, "llm_mlp": 64}


def openvla_oft() -> TokenModel:
    sizes = tiny_openvla_oft.TinySizes(**SMALL, chunk_length=2, fused=True)
    return OpenVLAOFTModel(tiny_openvla_oft.tiny_config(TOKENIZER, sizes))


def scratch_vla(lora_rank: int = 0) -> TokenModel:
    sizes = tiny_scratch_vla.ScratchSizes(
        **SMALL, chunk_length=2, num_towers=2, decoding="autoregressive", lora_rank=lora_rank
    )
    return ScratchVLAModel(tiny_scratch_vla.tiny_config(NUM_WORDS, sizes))


def scratch_vla_with_adapters() -> TokenModel:
    return scratch_vla(lora_rank=4)


Build = Callable[[], TokenModel]
PLAIN = pytest.mark.parametrize("build", [openvla_oft, scratch_vla])


def make(build: Build, seed: int = 0) -> TokenModel:
    torch.manual_seed(seed)
    return build()


def adapted(build: Build) -> TokenModel:
    """A model with adapters, which have moved away from their start."""
    model = make(build)
    if not any("lora_B" in name for name, _ in model.named_parameters()):
        model.add_adapters(rank=4, alpha=8, targets="all-linear")
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.3)
    return model


def as_they_are(model: TokenModel) -> dict[str, MakeWeight]:
    return {name: partial(torch.clone, weight) for name, weight in model.state_dict().items()}


def answer(model: TokenModel) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return model(
        pixel_values=torch.randn(3, 6, 28, 28, generator=generator),
        input_ids=torch.randint(4, NUM_WORDS, (3, 7), generator=generator),
        action_tokens=torch.randint(0, 256, (3, 14), generator=generator),
        with_nll=True,
    )


def trained(model: TokenModel) -> set[str]:
    return {name for name, weight in model.named_parameters() if weight.requires_grad}


@PLAIN
def test_new_adapters_change_nothing(build: Build) -> None:
    plain = make(build)
    model = copy.deepcopy(plain)
    model.add_adapters(rank=4, alpha=8, targets="all-linear")
    assert torch.equal(answer(model)["logits"], answer(plain)["logits"])
    assert torch.equal(answer(model)["nll"], answer(plain)["nll"])


def test_all_of_openvla_learns_through_adapters() -> None:
    names = trained(adapted(openvla_oft))
    assert names
    assert all(".lora_" in name for name in names)
    for part in ("lm_head", "projector.fc1", "self_attn.q_proj", "mlp.fc1", "attn.qkv"):
        assert any(part in name for name in names), part


def test_what_is_new_in_a_scratch_vla_learns_whole() -> None:
    names = trained(adapted(scratch_vla))
    assert {"projector.fc1.weight", "action_tokens.head.weight"} <= names
    language = {name for name in names if name.startswith("language_model.")}
    assert language
    assert all(".lora_" in name for name in language)
    assert language == {
        name for name in trained(scratch_vla_with_adapters()) if name.startswith("language_model.")
    }, "a policy's own adapters stand where those of a fine-tuning do"


@PLAIN
def test_the_gradient_reaches_every_factor(build: Build) -> None:
    model = adapted(build)
    answer(model)["nll"].sum().backward()
    idle = {
        name
        for name, weight in model.named_parameters()
        if weight.requires_grad and (weight.grad is None or not weight.grad.any())
    }
    # SigLIP's last norm is not asked for: patches are read behind it, but no pooled image
    assert {name for name in idle if ".lora_" in name} == set()


@pytest.mark.parametrize("build", [openvla_oft, scratch_vla, scratch_vla_with_adapters])
def test_merged_weights_answer_as_the_adapters_do(build: Build) -> None:
    model = adapted(build)
    plain = AutoModel.from_config(model.merged_config())
    assert not any(".lora_" in name for name in plain.state_dict())
    merged = merge_adapters(model, as_they_are(model))
    plain.load_state_dict({name: make() for name, make in merged.items()}, strict=True)
    mine, theirs = answer(plain), answer(model)
    assert not torch.allclose(mine["logits"], answer(make(build))["logits"], atol=0.1)
    assert torch.allclose(mine["logits"], theirs["logits"], atol=1e-3)
    assert torch.allclose(mine["nll"], theirs["nll"], atol=1e-3)


def test_adapters_can_be_left_out_of_an_answer() -> None:
    plain, model = make(openvla_oft), adapted(openvla_oft)
    learned = answer(model)["logits"]
    with without_adapters(model):
        assert torch.equal(answer(model)["logits"], answer(plain)["logits"])
    assert torch.equal(answer(model)["logits"], learned)


def test_a_model_without_adapters_is_merged_as_it_is() -> None:
    model = make(openvla_oft)
    makes = as_they_are(model)
    merged = merge_adapters(model, makes)
    assert merged.keys() == makes.keys()
    assert all(merged[name] is makes[name] for name in makes)


def test_a_weight_is_merged_when_it_is_asked_for_and_no_other_is_made() -> None:
    model = adapted(openvla_oft)
    made: list[str] = []

    def make(name: str, weight: Tensor) -> Tensor:
        made.append(name)
        return weight

    makes = {name: partial(make, name, w) for name, w in model.state_dict().items()}
    merged = merge_adapters(model, makes)
    assert not made
    name = next(name for name in merged if name.endswith("q_proj.weight"))
    merged[name]()
    layer = name.removesuffix(".weight")
    wanted = ("base_layer", "lora_A.default", "lora_B.default")
    assert sorted(made) == [f"{layer}.{part}.weight" for part in wanted]


def test_the_language_model_alone_learns_where_that_is_the_target() -> None:
    model = make(openvla_oft)
    model.add_adapters(rank=4, alpha=8, targets="language_model")
    names = trained(model)
    assert all(name.startswith("language_model.model.layers.") for name in names)
    assert len(names) == 2 * 7 * SMALL["llm_depth"]


def test_adapters_have_as_many_weights_as_was_counted_on_the_published_model() -> None:
    """79,953,920 at rank 32 on the language model: its seven linear layers, 32 times."""
    with torch.device("meta"):
        model = OpenVLAOFTModel(OpenVLAOFTConfig())
        model.add_adapters(rank=32, alpha=16, targets="language_model")
    assert sum(w.numel() for w in model.parameters() if w.requires_grad) == 79_953_920


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_4_bits_are_near_what_they_stand_for_and_stay_as_they_are(dtype: torch.dtype) -> None:
    """QLoRA's code has 16 values for a block of 64: a normal weight is off by 9% of its spread."""
    torch.manual_seed(0)
    part = torch.nn.ModuleDict({"thin": torch.nn.Linear(64, 96), "free": torch.nn.Linear(64, 8)})
    part.to(dtype)["free"].requires_grad_(False)
    before = {name: weight.clone() for name, weight in part.state_dict().items()}
    add_adapters(part, rank=2, alpha=2)
    quantize_under_adapters(part, "cpu")
    state = {name: make() for name, make in plain_weights(part).items()}
    error = (state["thin.base_layer.weight"] - before["thin.weight"]).float()
    assert 0.03 < error.std() / before["thin.weight"].float().std() < 0.15
    assert torch.equal(state["free.weight"], before["free.weight"])
    seen = torch.randn(5, 64, dtype=dtype)
    with torch.no_grad():
        said = part.eval()["thin"](seen)
    assert torch.equal(part.train()["thin"](seen), said), "as in an update"
    again = plain_weights(part)["thin.base_layer.weight"]()
    assert torch.equal(again, state["thin.base_layer.weight"])
