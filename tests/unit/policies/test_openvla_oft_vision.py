from __future__ import annotations

from dataclasses import replace

import torch
from torch.nn import functional

from verl_vla.policies.openvla_oft.configuration import VisionTower
from verl_vla.policies.openvla_oft.tiny import TinySizes, build_tokenizer, tiny_config
from verl_vla.policies.openvla_oft.vision import Block, FusedVisionBackbone, VisionTransformer

CONFIG = tiny_config(build_tokenizer(["lift the cube"]), TinySizes(image_size=28))
TOWER = VisionTower(
    patch_size=14,
    hidden_size=12,
    depth=3,
    heads=3,
    mlp_size=24,
    class_token=True,
    registers=4,
    layer_scale=True,
    attention_pool=True,
)
PLAIN = replace(TOWER, class_token=False, registers=0, layer_scale=False, attention_pool=False)


def random_tower(tower: VisionTower) -> VisionTransformer:
    torch.manual_seed(0)
    model = VisionTransformer(tower, CONFIG)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return model


def test_patches_come_row_by_row() -> None:
    tower = random_tower(replace(PLAIN, depth=1))  # one block: nothing runs but the embedding
    pixels = torch.randn(1, 3, 28, 28)
    features = tower(pixels) - tower.pos_embed
    for index, (top, left) in enumerate([(0, 0), (0, 14), (14, 0), (14, 14)]):
        patch = pixels[:, :, top : top + 14, left : left + 14]
        expected = tower.patch_embed.proj(patch).flatten()
        assert torch.allclose(features[0, index], expected, atol=1e-5)


def test_prefix_tokens_take_part_have_no_position_and_are_dropped() -> None:
    tower = random_tower(TOWER)
    pixels = torch.randn(2, 3, 28, 28)
    seen: list[torch.Tensor] = []
    tower.blocks[0].register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    features = tower(pixels)
    assert features.shape == (2, 4, 12)
    assert seen[0].shape == (2, 9, 12)
    assert torch.equal(seen[0][1, 0], tower.cls_token[0, 0])
    assert torch.equal(seen[0][1, 1:5], tower.reg_token[0])
    with torch.no_grad():
        tower.reg_token[..., 0] += 5
    assert (tower(pixels) - features).abs().max() > 1e-4


def test_the_last_block_and_the_final_norm_do_not_run() -> None:
    tower = random_tower(TOWER)
    pixels = torch.randn(1, 3, 28, 28)
    features = tower(pixels)
    ran: list[int] = []
    for index, block in enumerate(tower.blocks):
        block.register_forward_hook(lambda *_call, index=index: ran.append(index))
    tower.norm.register_forward_hook(lambda *_call: ran.append(-1))
    assert torch.equal(tower(pixels), features)
    assert ran == [0, 1]


def test_a_block_is_a_pre_norm_transformer_block_with_exact_gelu() -> None:
    torch.manual_seed(0)
    block = Block(TOWER).double()
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    x = torch.randn(2, 5, 12, dtype=torch.float64)

    def norm(values: torch.Tensor, layer: torch.nn.LayerNorm) -> torch.Tensor:
        centred = values - values.mean(-1, keepdim=True)
        scale = (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        return centred / scale * layer.weight + layer.bias

    qkv = block.attn.qkv(norm(x, block.norm1)).view(2, 5, 3, 3, 4)
    query, key, value = qkv.unbind(2)
    weights = torch.einsum("bqhd,bkhd->bhqk", query, key).div(2).softmax(-1)
    mixed = torch.einsum("bhqk,bkhd->bqhd", weights, value).reshape(2, 5, 12)
    half = x + block.ls1.scale_factor * block.attn.proj(mixed)
    inner = block.mlp.fc1(norm(half, block.norm2))
    inner = inner * 0.5 * (1 + torch.erf(inner / 2**0.5))
    expected = half + block.ls2.scale_factor * functional.linear(
        inner, block.mlp.fc2.weight, block.mlp.fc2.bias
    )
    assert torch.allclose(block(x), expected, atol=1e-10)


def test_towers_are_put_side_by_side_patch_by_patch() -> None:
    config = tiny_config(
        build_tokenizer(["lift the cube"]), TinySizes(image_size=28, fused=True, num_views=2)
    )
    backbone = FusedVisionBackbone(config)
    pixels = torch.randn(3, 12, 28, 28)
    features = backbone(pixels)
    assert features.shape == (3, 2 * 4, 2 * 72) == (3, config.num_patches, backbone.hidden_size)
    second_view = backbone.fused_featurizer(pixels[:, 9:12])
    assert torch.allclose(features[:, 4:, 72:], second_view, atol=1e-5)


def test_one_tower_is_possible() -> None:
    backbone = FusedVisionBackbone(CONFIG)
    assert backbone.fused_featurizer is None
    assert backbone(torch.randn(2, 3, 28, 28)).shape == (2, 4, 72)
