"""OpenVLA-OFT in its token form, on transformers' own Llama, with the published key names.

One forward pass scores every action token of a chunk. The sequence is

    BOS | image patches | rest of the prompt | T zero vectors | stop | padding

and every token attends to every other, except to padding. The logits of action token ``k`` are
read one place before its zero vector, over the action ids alone. Source: openvla-oft,
``prismatic/extern/hf/modeling_prismatic.py``, with the attention of its transformers fork.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaForCausalLM, PreTrainedModel
from transformers import initialization as init
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.utils.generic import ModelOutput

from verl_vla.errors import ConfigError, ContractError
from verl_vla.policies.openvla_oft.configuration import OpenVLAOFTConfig
from verl_vla.policies.openvla_oft.lora import head_rows
from verl_vla.policies.openvla_oft.sequence import move_padding_last, prompt_lengths, read_from
from verl_vla.policies.openvla_oft.vision import (
    AttentionPool,
    FusedVisionBackbone,
    LayerScale,
    VisionTransformer,
)

BIDIRECTIONAL_ATTENTION = ("sdpa", "eager")
"""Back ends of transformers 5 that honour ``is_causal=False`` with and without padding."""
PROJECTOR_EXPANSION = 4
"""Width of the projector's first layer over the width of its input."""


@dataclass
class ActionLogits(ModelOutput):
    """What the model answers.

    Args:
        logits: [B, T, C] float32, column ``k`` scores bin ``k``.
        nll: [B, T + 1] float32, nats: minus the log-probability of each demonstrated action token
            and of the stop behind them, among the whole vocabulary; where bins were given.
    """

    logits: Tensor | None = None
    nll: Tensor | None = None


class OpenVLAOFTModel(PreTrainedModel):
    """Scores the action tokens of one chunk from images and a prompt."""

    config_class = OpenVLAOFTConfig
    base_model_prefix = ""
    main_input_name = "pixel_values"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["LlamaDecoderLayer", "Block"]

    config: OpenVLAOFTConfig

    def __init__(self, config: OpenVLAOFTConfig) -> None:
        super().__init__(config)
        self.vision_backbone = FusedVisionBackbone(config)
        self.projector = Projector(self.vision_backbone.hidden_size, config.language.hidden_size)
        self.language_model = LlamaForCausalLM(config.language)
        for layer in _layers(self.language_model):
            layer.self_attn.is_causal = False
        self.post_init()
        self.freeze_unused()
        require_bidirectional(self)

    @classmethod
    def from_pretrained(cls, folder: Any, *args: Any, **kwargs: Any) -> OpenVLAOFTModel:
        """Load config and weights; everything else that a folder holds is left alone.

        Takes what `PreTrainedModel.from_pretrained` takes.

        Raises:
            ConfigError: if a weight is missing, superfluous or of another shape.
        """
        kwargs["output_loading_info"] = True
        loaded: Any = super().from_pretrained(folder, *args, **kwargs)
        model, report = loaded
        for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            if report[problem]:
                names = sorted(str(key) for key in report[problem])
                raise ConfigError(
                    f"{folder}: {len(names)} {problem.replace('_', ' ')}, first {names[:3]}; the "
                    "weights do not belong to this config.json: take both from one checkpoint"
                )
        model.freeze_unused()  # loading makes every parameter trainable again
        return model

    def freeze_unused(self) -> None:
        """Take the weights that never run out of training."""
        for tower in self.vision_backbone.towers:
            tower.freeze_unused()

    def action_logits(
        self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor | None = None
    ) -> Tensor:
        """Score every bin of every action token.

        Args:
            pixel_values: [B, V * towers * 3, H, W], normalised.
            input_ids: [B, L] prompts, padded on the right.
            attention_mask: [B, L], 1 where a prompt is and 0 where padding is; None without any.

        Returns:
            [B, T, C] float32.
        """
        return self(pixel_values, input_ids, attention_mask).logits

    def forward(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        demonstrated: Tensor | None = None,
    ) -> ActionLogits:
        """Compute what `action_logits` returns; the entry that FSDP and adapters wrap.

        Args:
            pixel_values: see `action_logits`.
            input_ids: see `action_logits`.
            attention_mask: see `action_logits`.
            demonstrated: [B, T] int64 bins to be imitated; with them comes `ActionLogits.nll`.
        """
        num_tokens = self.config.num_action_tokens
        if demonstrated is None:
            hidden = self._think(pixel_values, input_ids, attention_mask, num_tokens)
            return ActionLogits(logits=self._score(hidden))
        hidden = self._think(pixel_values, input_ids, attention_mask, num_tokens + 1)
        of_all = self._score_all(hidden)
        stop = demonstrated.new_full((len(demonstrated), 1), self.config.stop_id)
        labels = torch.cat([self.config.first_action_id + demonstrated, stop], dim=1)
        nll = functional.cross_entropy(of_all.transpose(1, 2), labels, reduction="none")
        return ActionLogits(logits=of_all[:, :num_tokens, self._action_ids], nll=nll)

    def action_mass(
        self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor | None = None
    ) -> Tensor:
        """How much of the whole vocabulary's probability falls on the action ids.

        Near 1 for a model that was trained to say action tokens, near 0 for one whose actions
        come from a regression head. Arguments as of `action_logits`.

        Returns:
            [B, T] float32, 0 to 1.
        """
        num_tokens = self.config.num_action_tokens
        of_all = self._score_all(self._think(pixel_values, input_ids, attention_mask, num_tokens))
        return (of_all[..., self._action_ids].logsumexp(-1) - of_all.logsumexp(-1)).exp()

    @property
    def _action_ids(self) -> slice:
        start = self.config.first_action_id
        return slice(start, start + self.config.n_action_bins)

    def _think(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        num_positions: int,
    ) -> Tensor:
        """Run everything but the head.

        Returns:
            [B, num_positions, D], the states that the first tokens behind the prompt are read from.
        """
        require_bidirectional(self)
        num_prompts, num_ids = input_ids.shape
        lengths = prompt_lengths(attention_mask)
        embeddings = self._embed(input_ids)
        patches = self.projector(self.vision_backbone(pixel_values))
        embeddings, keep = move_padding_last(embeddings, lengths, num_ids)
        sequence = torch.cat([embeddings[:, :1], patches, embeddings[:, 1:]], dim=1)
        self._check_length(sequence.shape[1], num_ids)
        mask = None
        if keep is not None:
            front = keep.new_ones(num_prompts, 1 + patches.shape[1])
            mask = torch.cat([front, keep], dim=1).long()
        hidden = self.language_model.model(
            inputs_embeds=sequence, attention_mask=mask, use_cache=False
        ).last_hidden_state
        first = patches.shape[1] - 1 + (num_ids if lengths is None else lengths)
        return read_from(hidden, first, num_positions)

    def get_input_embeddings(self) -> nn.Module:
        """Return the table of token embeddings."""
        return self.language_model.model.embed_tokens

    def _check_length(self, length: int, num_ids: int) -> None:
        longest = self.config.language.max_position_embeddings
        if length > longest:
            raise ContractError(
                f"a prompt of {num_ids} ids makes a sequence of {length}; the language model has "
                f"{longest} positions"
            )

    def _embed(self, input_ids: Tensor) -> Tensor:
        """Embed prompts, then T zero vectors, then the stop token: [B, L + T + 1, D]."""
        stop = input_ids.new_full((len(input_ids), 1), self.config.stop_id)
        embedded = self.get_input_embeddings()(torch.cat([input_ids, stop], dim=1))
        slots = embedded.new_zeros(
            len(input_ids), self.config.num_action_tokens, embedded.shape[-1]
        )
        return torch.cat([embedded[:, :-1], slots, embedded[:, -1:]], dim=1)

    def _score(self, hidden: Tensor) -> Tensor:
        """Apply the action ids' rows of the head in float32, under autocast too."""
        rows = head_rows(self.language_model.lm_head, self._action_ids)
        with torch.autocast(device_type=hidden.device.type, enabled=False):
            return functional.linear(hidden.float(), rows)

    def _score_all(self, hidden: Tensor) -> Tensor:
        """Apply every row of the head, as `_score` applies some."""
        rows = head_rows(self.language_model.lm_head, slice(None))
        with torch.autocast(device_type=hidden.device.type, enabled=False):
            return functional.linear(hidden.float(), rows)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, VisionTransformer):
            init.normal_(module.pos_embed, std=self.config.position_embedding_std)
            for name in module.prefix_names:
                init.normal_(module.get_parameter(name), std=self.config.initializer_range)
        elif isinstance(module, LayerScale):
            init.constant_(module.scale_factor, self.config.layer_scale_init)
        elif isinstance(module, AttentionPool):
            init.normal_(module.latent, std=self.config.initializer_range)


class Projector(nn.Module):
    """Carries patch features into the language model's width."""

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


def require_bidirectional(model: OpenVLAOFTModel) -> None:
    """Refuse a language model whose attention would be causal.

    A causal model runs without complaint and acts badly, so every way to become one is checked.

    Raises:
        ConfigError: names what is wrong.
    """
    language = model.config.language
    backend = language._attn_implementation  # pyright: ignore[reportPrivateUsage]
    if backend not in BIDIRECTIONAL_ATTENTION:
        raise ConfigError(
            f"attn_implementation is '{backend}'; OpenVLA-OFT needs attention in both directions, "
            f"which is ensured for {BIDIRECTIONAL_ATTENTION}: choose one of them"
        )
    layers = _layers(model.language_model)
    if language.is_causal or any(layer.self_attn.is_causal for layer in layers):
        raise ConfigError(
            "the language model's is_causal is true; OpenVLA-OFT was trained with attention in "
            "both directions: leave text_config.is_causal and every self_attn.is_causal false"
        )


def _layers(language_model: LlamaForCausalLM) -> list[LlamaDecoderLayer]:
    return cast("list[LlamaDecoderLayer]", list(language_model.model.layers))
