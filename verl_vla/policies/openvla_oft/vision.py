"""The vision towers of OpenVLA: plain vision transformers, with the published key names.

They compute the same as timm 0.9.10's ``vit_large_patch14_reg4_dinov2`` and
``vit_so400m_patch14_siglip_224`` for the output of the last block but one, without the final norm.
Weights that are stored but never run (last block, norm, pooling head) are kept, so that a saved
checkpoint has every key, and are frozen.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.modeling_layers import GradientCheckpointingLayer

from verl_vla.policies.openvla_oft.configuration import OpenVLAOFTConfig, VisionTower

NORM_EPSILON = 1e-6
"""Epsilon of timm's LayerNorm in vision transformers; PyTorch's default is ten times larger."""
PROJECTOR_EXPANSION = 4
"""Ratio of the width of the projector's first layer to the width of its input."""


class FusedVisionBackbone(nn.Module):
    """One or two towers whose patch features are concatenated."""

    def __init__(self, config: OpenVLAOFTConfig) -> None:
        super().__init__()
        towers = config.towers
        self.num_towers = len(towers)
        self.hidden_size = sum(tower.hidden_size for tower in towers)
        self.featurizer = VisionTransformer(towers[0], config)
        fused = VisionTransformer(towers[1], config) if self.num_towers > 1 else None
        self.fused_featurizer = fused

    @property
    def towers(self) -> list[VisionTransformer]:
        """The towers in the order of the pixel channels."""
        if self.fused_featurizer is None:
            return [self.featurizer]
        return [self.featurizer, self.fused_featurizer]

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Compute patch features.

        Args:
            pixel_values: [B, V * towers * 3, H, W]; all channels of a view, then the next view.

        Returns:
            [B, V * patches, hidden_size].
        """
        # [B, V * towers * 3, H, W] -> [B * V, towers * 3, H, W]
        views = pixel_values.reshape(-1, 3 * self.num_towers, *pixel_values.shape[-2:])
        # three channels a tower, since each has its own normalisation
        shares = zip(self.towers, views.split(3, dim=1), strict=True)
        features = torch.cat([tower(pixels) for tower, pixels in shares], dim=-1)
        # [B * V, patches, D] -> [B, V * patches, D]
        return features.reshape(len(pixel_values), -1, self.hidden_size)


class VisionTransformer(nn.Module):
    """One vision tower."""

    def __init__(self, tower: VisionTower, config: OpenVLAOFTConfig) -> None:
        super().__init__()
        width = tower.hidden_size
        num_patches = (config.image_size // tower.patch_size) ** 2
        self.num_prefix = int(tower.class_token) + tower.registers
        self.prefix_names: list[str] = []
        self.patch_embed = PatchEmbed(width, tower.patch_size)
        self.pos_embed = nn.Parameter(torch.zeros(1, num_patches, width))
        if tower.class_token:
            self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
            self.prefix_names.append("cls_token")
        if tower.registers:
            self.reg_token = nn.Parameter(torch.zeros(1, tower.registers, width))
            self.prefix_names.append("reg_token")
        self.blocks = nn.ModuleList(Block(tower) for _ in range(tower.depth))
        self.norm = nn.LayerNorm(width, eps=NORM_EPSILON)
        pool = AttentionPool(width, tower.mlp_size) if tower.attention_pool else None
        self.attn_pool = pool

    def forward(self, pixels: Tensor) -> Tensor:
        """Map [B, 3, H, W] to [B, patches, width]."""
        x = self.patch_embed(pixels) + self.pos_embed
        # after the positions: class and register tokens have none (timm's no_embed_class)
        if self.num_prefix:
            prefix = [self.get_parameter(name).expand(len(x), -1, -1) for name in self.prefix_names]
            x = torch.cat([*prefix, x], dim=1)
        # all but the last block, whose output OpenVLA does not use
        for block in self.blocks[:-1]:
            x = block(x)
        return x[:, self.num_prefix :]

    def freeze_unused(self) -> None:
        """Freeze weights that never run, so that optimizers and FSDP expect no gradients."""
        self.blocks[-1].requires_grad_(False)
        self.norm.requires_grad_(False)
        if self.attn_pool is not None:
            self.attn_pool.requires_grad_(False)


class PatchEmbed(nn.Module):
    """Embedding of an image's patches."""

    def __init__(self, width: int, patch_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, kernel_size=patch_size, stride=patch_size)

    def forward(self, pixels: Tensor) -> Tensor:
        """Map [B, 3, H, W] to [B, patches, width], row by row of the image."""
        # the weight's dtype, not the model's: FSDP may compute in another dtype than it stores
        return self.proj(pixels.to(self.proj.weight.dtype)).flatten(2).transpose(1, 2)


class Block(GradientCheckpointingLayer):
    """Transformer block: attention and MLP, each after a norm and with a residual connection."""

    def __init__(self, tower: VisionTower) -> None:
        super().__init__()
        width = tower.hidden_size
        self.norm1 = nn.LayerNorm(width, eps=NORM_EPSILON)
        self.attn = Attention(width, tower.heads)
        self.norm2 = nn.LayerNorm(width, eps=NORM_EPSILON)
        self.mlp = Mlp(width, tower.mlp_size)
        self.ls1 = LayerScale(width) if tower.layer_scale else nn.Identity()
        self.ls2 = LayerScale(width) if tower.layer_scale else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, tokens, width] to the same shape."""
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class Attention(nn.Module):
    """Multi-head self-attention over all tokens."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, tokens, width] to the same shape."""
        batch, tokens, width = x.shape
        qkv = self.qkv(x).view(batch, tokens, 3, self.heads, width // self.heads)
        # [B, tokens, 3, heads, d] -> three of [B, heads, tokens, d]
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(query, key, value)
        return self.proj(mixed.transpose(1, 2).reshape(batch, tokens, width))


class Mlp(nn.Module):
    """Two layers with an exact GELU between them."""

    def __init__(self, width: int, mlp_size: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, mlp_size)
        self.fc2 = nn.Linear(mlp_size, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., width] to the same shape."""
        return self.fc2(functional.gelu(self.fc1(x)))


class LayerScale(nn.Module):
    """A learnt factor for every channel of a residual branch."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale_factor = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., width] to the same shape."""
        return x * self.scale_factor


class AttentionPool(nn.Module):
    """SigLIP's pooling head, whose weights a checkpoint stores and OpenVLA never runs."""

    def __init__(self, width: int, mlp_size: int) -> None:
        super().__init__()
        self.latent = nn.Parameter(torch.zeros(1, 1, width))
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=NORM_EPSILON)
        self.mlp = Mlp(width, mlp_size)


class Projector(nn.Module):
    """Projection of patch features to the language model's width."""

    def __init__(self, vision_width: int, language_width: int) -> None:
        super().__init__()
        hidden = PROJECTOR_EXPANSION * vision_width
        self.fc1 = nn.Linear(vision_width, hidden)
        self.fc2 = nn.Linear(hidden, language_width)
        self.fc3 = nn.Linear(language_width, language_width)

    def forward(self, features: Tensor) -> Tensor:
        """Map [..., vision_width] to [..., language_width]."""
        x = functional.gelu(self.fc1(features))
        return self.fc3(functional.gelu(self.fc2(x)))
