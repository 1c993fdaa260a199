from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn import functional
from transformers.integrations import flash_attention
from transformers.utils import is_flash_attn_2_available

from verl_vla.core.errors import ConfigError, ContractError
from verl_vla.policies.openvla_oft import OpenVLAOFTConfig, OpenVLAOFTModel
from verl_vla.policies.openvla_oft.tiny import (
    POSITION_STD,
    WEIGHT_STD,
    TinySizes,
    build_tokenizer,
    tiny_config,
)

SIZES = TinySizes(
    image_size=28, vision_width=24, llm_width=32, llm_depth=2, llm_mlp=64, chunk_length=4
)
FUSED = TinySizes(
    image_size=28,
    vision_width=24,
    llm_width=32,
    llm_depth=2,
    llm_mlp=64,
    chunk_length=4,
    fused=True,
    num_views=2,
)
PAD = 3


def make_model(sizes: TinySizes = SIZES, seed: int = 0) -> OpenVLAOFTModel:
    torch.manual_seed(seed)
    config = tiny_config(build_tokenizer(["lift the cube"]), sizes)
    return OpenVLAOFTModel(config)


def make_inputs(model: OpenVLAOFTModel, lengths: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Random pixels and right-padded prompts of the given lengths, at least two different."""
    generator = torch.Generator().manual_seed(1)
    config = model.config
    channels = 3 * len(config.towers) * config.num_images_in_input
    shape = (len(lengths), channels, config.image_size, config.image_size)
    pixels = torch.randn(shape, generator=generator)
    ids = torch.randint(4, 20, (len(lengths), max(lengths)), generator=generator)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return pixels, ids.where(mask, PAD), mask.long()


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    store = f"file://{tmp_path / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_the_published_architecture_has_the_published_keys_and_bytes() -> None:
    """982 tensors and the total of the published model.safetensors.index.json."""
    with torch.device("meta"):
        state = OpenVLAOFTModel(OpenVLAOFTConfig()).state_dict()
    assert len(state) == 982
    assert sum(tensor.numel() for tensor in state.values()) * 2 == 15_082_474_368
    for key in (
        "vision_backbone.featurizer.blocks.23.ls2.scale_factor",
        "vision_backbone.featurizer.reg_token",
        "vision_backbone.fused_featurizer.attn_pool.latent",
        "vision_backbone.fused_featurizer.blocks.26.mlp.fc2.bias",
        "projector.fc3.weight",
        "language_model.model.layers.31.self_attn.o_proj.weight",
        "language_model.lm_head.weight",
    ):
        assert key in state


@pytest.mark.parametrize("sizes", [SIZES, FUSED], ids=["one tower", "two towers, two views"])
def test_logits_cover_every_action_token_and_bin(sizes: TinySizes) -> None:
    model = make_model(sizes)
    pixels, ids, mask = make_inputs(model, [9, 9])
    logits = model.action_logits(pixels, ids, mask)
    assert logits.shape == (2, 4 * 7, 256)
    assert logits.dtype == torch.float32
    assert torch.equal(model(pixels, ids, mask).logits, logits)


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("lengths", [[9], [9, 6]])
def test_the_first_position_sees_the_last_token(backend: str, lengths: list[int]) -> None:
    """The test that tells a bidirectional model from a silently causal one."""
    model = make_model()
    model.set_attn_implementation(backend)
    inputs = make_inputs(model, lengths)
    hidden: list[Tensor] = []
    model.language_model.model.norm.register_forward_hook(lambda *call: hidden.append(call[2]))
    model.action_logits(*inputs)
    with torch.no_grad():  # the stop token is the last of the sequence
        model.get_input_embeddings().weight[model.config.stop_id] += 1
    model.action_logits(*inputs)
    assert (hidden[0][:, 0] - hidden[1][:, 0]).abs().amax(-1).min() > 1e-4


@pytest.mark.parametrize("sizes", [SIZES, FUSED], ids=["one tower", "two towers, two views"])
def test_a_batch_of_different_prompts_equals_each_alone(sizes: TinySizes) -> None:
    model = make_model(sizes)
    lengths = [7, 12, 5, 12]
    pixels, ids, mask = make_inputs(model, lengths)
    together = model.action_logits(pixels, ids, mask)
    for row, length in enumerate(lengths):
        one = slice(row, row + 1)
        alone = model.action_logits(pixels[one], ids[one, :length])
        assert (together[one] - alone).abs().max() < 1e-5


@pytest.mark.parametrize(("lengths", "has_mask"), [([6, 6], False), ([6, 4], True)])
def test_without_padding_attention_runs_without_a_mask(
    monkeypatch: pytest.MonkeyPatch, lengths: list[int], has_mask: bool
) -> None:
    """A mask keeps SDPA from its fastest kernels."""
    model = make_model().eval()
    masks: list[Tensor | None] = []
    attend = functional.scaled_dot_product_attention

    def noted(*args: Tensor, **kwargs: Any) -> Tensor:
        if "attn_mask" in kwargs:  # the language model's; the towers have none
            masks.append(kwargs["attn_mask"])
            assert not kwargs["is_causal"]
        return attend(*args, **kwargs)

    monkeypatch.setattr(functional, "scaled_dot_product_attention", noted)
    model.action_logits(*make_inputs(model, lengths))
    assert len(masks) == SIZES.llm_depth
    assert all((mask is not None) == has_mask for mask in masks)


def test_padding_holds_nothing() -> None:
    model = make_model()
    pixels, ids, mask = make_inputs(model, [7, 12])
    other = ids.where(mask.bool(), 17)
    difference = model.action_logits(pixels, ids, mask) - model.action_logits(pixels, other, mask)
    assert difference.abs().max() < 1e-6


def test_every_action_token_is_read_one_place_before_its_slot() -> None:
    """With the position-wise parts alone, a logit depends on nothing but its own place."""
    model = make_model()
    pixels, ids, mask = make_inputs(model, [6, 8])
    seen: list[Tensor] = []
    model.language_model.model.register_forward_hook(
        lambda _m, _a, kwargs, out: seen.extend([kwargs["inputs_embeds"], out.last_hidden_state]),
        with_kwargs=True,
    )
    logits = model.action_logits(pixels, ids, mask)
    embeds, hidden = seen
    table = model.get_input_embeddings().weight
    rows = model.language_model.lm_head.weight[model.config.first_action_id :][:256]
    for row, length in enumerate([6, 8]):
        last = model.config.num_patches + length - 1
        slots = slice(last + 1, last + 1 + 28)
        assert torch.equal(embeds[row, 0], table[ids[row, 0]])
        assert torch.equal(embeds[row, last], table[ids[row, length - 1]])
        assert embeds[row, slots].abs().sum() == 0
        assert torch.equal(embeds[row, slots.stop], table[model.config.stop_id])
        expected = hidden[row, last : last + 28] @ rows.T
        assert torch.allclose(logits[row], expected, atol=1e-5)


def test_two_views_are_not_interchangeable_and_each_tower_sees_its_channels() -> None:
    model = make_model(FUSED)
    pixels, ids, mask = make_inputs(model, [6])
    seen: list[Tensor] = []
    for tower in model.vision_backbone.towers:
        tower.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    logits = model.action_logits(pixels, ids, mask)
    assert torch.equal(seen[0], torch.stack([pixels[0, 0:3], pixels[0, 6:9]]))
    assert torch.equal(seen[1], torch.stack([pixels[0, 3:6], pixels[0, 9:12]]))
    swapped = torch.cat([pixels[:, 6:], pixels[:, :6]], 1)
    assert (model.action_logits(swapped, ids, mask) - logits).abs().max() > 1e-4


def test_what_never_runs_is_frozen_and_all_else_learns() -> None:
    model = make_model(FUSED)
    logits = model.action_logits(*make_inputs(model, [6, 8]))
    logits.square().sum().backward()
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    still = {name for name, p in model.named_parameters() if p.requires_grad and p.grad is None}
    assert still == set()
    assert {name.split(".")[2] for name in frozen} == {"blocks", "norm", "attn_pool"}
    assert {name.split(".")[3] for name in frozen if ".blocks." in name} == {"2"}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in frozen:
                parameter.fill_(float("nan"))
    assert torch.isfinite(model.action_logits(*make_inputs(model, [6, 8]))).all()


def test_gradient_checkpointing_changes_no_gradient() -> None:
    def gradients(model: OpenVLAOFTModel) -> list[Tensor]:
        model.action_logits(*make_inputs(model, [6, 8])).square().sum().backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    plain, saving = make_model(FUSED).train(), make_model(FUSED).train()
    saving.gradient_checkpointing_enable()
    blocks = [m for m in saving.modules() if type(m).__name__ in saving._no_split_modules]
    assert len(blocks) == 2 * 3 + 2 and all(block.gradient_checkpointing for block in blocks)
    for one, other in zip(gradients(plain), gradients(saving), strict=True):
        assert torch.allclose(one, other, atol=1e-6)


@pytest.mark.skipif(is_flash_attn_2_available(), reason="flash attention is available here")
def test_flash_attention_that_is_not_there_is_refused(tmp_path: Path) -> None:
    make_model().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="flash-attn, and one of them is missing here; install"):
        OpenVLAOFTModel.from_pretrained(tmp_path, attn_implementation="flash_attention_2")


@pytest.mark.parametrize("flag", [None, False])
def test_flash_attention_is_told_to_be_bidirectional(
    monkeypatch: pytest.MonkeyPatch, flag: bool | None
) -> None:
    """What transformers hands to the kernel, with a padded prompt; the kernel needs a GPU."""
    handed: list[dict[str, object]] = []

    def stand_in(query: Tensor, *_: Tensor, **kwargs: object) -> Tensor:
        handed.append(kwargs)
        return query

    monkeypatch.setattr(flash_attention, "_flash_attention_forward", stand_in)
    layer = make_model().language_model.model.layers[0].self_attn
    states = torch.zeros(1, 2, 5, 8)
    flash_attention.flash_attention_forward(layer, states, states, states, None, is_causal=flag)
    assert [call["is_causal"] for call in handed] == [False]


@pytest.mark.gpu
@pytest.mark.skipif(not is_flash_attn_2_available(), reason="flash attention is not available here")
@pytest.mark.parametrize("lengths", [[9], [9, 6]])
def test_flash_attention_agrees_with_sdpa(lengths: list[int]) -> None:
    model = make_model().to("cuda", torch.bfloat16)
    inputs = [part.to("cuda") for part in make_inputs(model, lengths)]
    expected = model.action_logits(*inputs)
    model.set_attn_implementation("flash_attention_2")
    assert (model.action_logits(*inputs) - expected).abs().max() < 0.1


@pytest.mark.parametrize("backend", ["flash_attention_3", "flex_attention"])
def test_a_back_end_that_is_not_known_to_be_bidirectional_is_refused(backend: str) -> None:
    model = make_model()
    model.config.language._attn_implementation = backend
    with pytest.raises(ConfigError, match=f"attn_implementation is '{backend}'"):
        model.action_logits(*make_inputs(model, [6]))


def test_a_model_that_was_made_causal_is_refused() -> None:
    model = make_model()
    model.config.language.is_causal = True
    with pytest.raises(ConfigError, match="is_causal is true"):
        model.action_logits(*make_inputs(model, [6]))
    model = make_model()
    model.language_model.model.layers[1].self_attn.is_causal = True
    with pytest.raises(ConfigError, match="is_causal is true"):
        model.action_logits(*make_inputs(model, [6]))


def test_left_padding_is_refused() -> None:
    model = make_model()
    pixels, ids, mask = make_inputs(model, [6, 8])
    with pytest.raises(ContractError, match="padded on the right"):
        model.action_logits(pixels, ids.flip(1), mask.flip(1))


def test_a_sequence_beyond_the_last_position_is_refused() -> None:
    model = make_model()
    model.config.language.max_position_embeddings = 40
    with pytest.raises(ContractError, match="makes a sequence of 41"):
        model.action_logits(*make_inputs(model, [8]))


def test_the_head_is_float32_under_autocast_and_in_bfloat16() -> None:
    model = make_model()
    inputs = make_inputs(model, [6, 8])
    exact = model.action_logits(*inputs)
    hidden: list[Tensor] = []
    model.language_model.model.norm.register_forward_hook(lambda *call: hidden.append(call[2]))
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model.action_logits(*inputs)
    rows = model.language_model.lm_head.weight[model.config.first_action_id :][:256]
    last = model.config.num_patches + 6 - 1
    assert mixed.dtype == torch.float32
    assert torch.allclose(mixed[0, 0], hidden[0][0, last].float() @ rows.T, atol=1e-5)
    half = model.to(torch.bfloat16).action_logits(*inputs)
    assert half.dtype == torch.float32
    assert 0 < (half - exact).abs().max() < 0.3


def test_saving_and_loading_changes_nothing(tmp_path: Path) -> None:
    model = make_model(FUSED)
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    again = OpenVLAOFTModel.from_pretrained(tmp_path)
    inputs = make_inputs(model, [6, 8])
    assert torch.equal(again.action_logits(*inputs), model.action_logits(*inputs))
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert {n for n, p in again.named_parameters() if p.requires_grad} == trainable


def test_loading_in_bfloat16_keeps_the_rotary_frequencies_exact(tmp_path: Path) -> None:
    make_model().save_pretrained(tmp_path)
    model = OpenVLAOFTModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.language_model.model.rotary_emb.inv_freq.dtype == torch.float32


def test_weights_that_do_not_belong_are_refused(tmp_path: Path) -> None:
    make_model().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    state = load_file(file)
    lacking = {key: value for key, value in state.items() if key != "projector.fc1.bias"}
    save_file(lacking, file, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match="1 missing keys, first .*projector.fc1.bias"):
        OpenVLAOFTModel.from_pretrained(tmp_path)
    save_file(state | {"action_head.weight": torch.zeros(1)}, file, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match="1 unexpected keys, first .*action_head.weight"):
        OpenVLAOFTModel.from_pretrained(tmp_path)


def test_initial_weights_follow_the_config() -> None:
    model = make_model(FUSED)
    tower = model.vision_backbone.featurizer
    assert tower.pos_embed.std().item() == pytest.approx(POSITION_STD, rel=0.2)
    assert torch.all(tower.blocks[0].ls1.scale_factor == 1.0)
    assert model.projector.fc1.weight.std().item() == pytest.approx(WEIGHT_STD, rel=0.1)
    assert model.language_model.lm_head.weight.std().item() == pytest.approx(WEIGHT_STD, rel=0.1)
    assert torch.all(model.get_input_embeddings().weight[PAD] == 0)


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize(("compute", "tolerance"), [(None, 1e-6), (torch.bfloat16, 0.3)])
def test_sharded_by_fsdp2_it_computes_and_learns_alike(
    compute: torch.dtype | None, tolerance: float
) -> None:
    plain, sharded = make_model(FUSED), make_model(FUSED)
    precision = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32)
    mesh = init_device_mesh("cpu", (1,))
    wrapped = [m for m in sharded.modules() if type(m).__name__ in sharded._no_split_modules]
    for module in [*wrapped, sharded]:
        fully_shard(module, mesh=mesh, mp_policy=precision)
    inputs = make_inputs(plain, [6, 8])
    expected, logits = plain.action_logits(*inputs), sharded.action_logits(*inputs)
    assert logits.dtype == torch.float32
    assert (logits - expected).abs().max() < tolerance
    expected.square().mean().backward()
    logits.square().mean().backward()
    pairs = zip(trainable(plain), trainable(sharded), strict=True)
    for one, other in pairs:
        assert one.grad is not None and other.grad is not None
        error = (one.grad - other.grad.full_tensor()).norm()
        assert error <= 1e-6 + tolerance * one.grad.norm()


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]
