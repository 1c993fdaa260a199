"""A vision-language-action model assembled from parts that were not trained on robots.

    image patches | prompt | action tokens

The logits of an action token are read one position before it, as in any language model, so the last
token needs no position. Parallel decoding puts zero vectors at the positions, and every token
attends to all others; autoregressive decoding puts the tokens sampled before there, and attention
is causal. Padding is between patches and prompt, and no token attends to it.
"""

from __future__ import annotations

import logging
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoConfig, AutoModel, Cache, DynamicCache, SiglipVisionModel

from verl_vla.config.choices import LoraTargets
from verl_vla.core.errors import ConfigError, ContractError
from verl_vla.policies.base import ActionLogits, ActionSampler
from verl_vla.policies.lora import ADAPTER_MARK, add_adapters
from verl_vla.policies.scratch_vla.action_tokens import (
    ActionTokens,
    embed_action_tokens,
    score_action_tokens,
)
from verl_vla.policies.scratch_vla.configuration import ScratchVLAConfig
from verl_vla.policies.token_model import TokenModel


def align_right(input_ids: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Move padding from a prompt's end to its start; return ids and bool mask of words, [B, L]."""
    if attention_mask is None:
        return input_ids, torch.ones_like(input_ids, dtype=torch.bool)
    if bool((attention_mask[:, 1:] > attention_mask[:, :-1]).any()):
        raise ContractError(
            "attention_mask has padding before a prompt's end; prompts are padded on the right"
        )
    lengths = attention_mask.sum(1, keepdim=True)
    positions = torch.arange(input_ids.shape[1], device=input_ids.device)
    # rotated by its length: the padding comes first, the words keep their order
    ids = input_ids.gather(1, (positions + lengths) % input_ids.shape[1])
    return ids, positions >= input_ids.shape[1] - lengths


def pairwise_mask(
    is_token: Tensor, num_queries: int, *, causal: bool, dtype: torch.dtype
) -> Tensor:
    """Return the mask [B, 1, Q, S]: 0 where a position attends to another, else the dtype's least.

    A padding position still attends to the patches, since a row without any would become NaN.
    """
    batch, num_keys = is_token.shape
    sees = is_token[:, None, None, :].expand(batch, 1, num_queries, num_keys)
    if causal:
        positions = torch.arange(num_keys, device=is_token.device)
        # the queries are the last positions of the sequence
        sees = sees & (positions <= positions[-num_queries:, None])
    hidden = torch.zeros(sees.shape, dtype=dtype, device=is_token.device)
    return hidden.masked_fill(~sees, torch.finfo(dtype).min)


logger = logging.getLogger(__name__)

ATTENTION = ("sdpa", "eager")
"""Back ends of transformers 5 that take a mask for every pair of tokens."""


@dataclass(frozen=True, slots=True)
class Prefix:
    """The tokens before the action tokens, which all of them may attend to."""

    embeddings: Tensor
    """[B, P + L, D] patches and prompt, in the language model's dtype."""
    is_token: Tensor
    """[B, P + L] bool, false at padding."""


class ScratchVLAModel(TokenModel):
    """Model that scores or samples the action tokens of one chunk, given images and a prompt."""

    config_class = ScratchVLAConfig

    config: ScratchVLAConfig

    def __init__(self, config: ScratchVLAConfig) -> None:
        super().__init__(config)
        towers = config.towers
        self.vision_towers = nn.ModuleList(SiglipVisionModel(tower) for tower in towers)
        width = config.language.hidden_size
        self.projector = Projector(sum(tower.hidden_size for tower in towers), width)
        self.language_model = AutoModel.from_config(config.language)
        if config.action_rows == "trained":
            self.action_tokens = ActionTokens(config.n_action_bins, width)
        self.post_init()
        self._require_attention()
        if config.lora_rank:
            # after post_init, which would initialise the adapters' zeros at random
            add_adapters(self.decoder, rank=config.lora_rank, alpha=config.lora_alpha)
        self.freeze_untrained()

    def freeze_untrained(self) -> None:
        """Freeze the weights that the configuration does not train."""
        config = self.config
        self.vision_towers.requires_grad_(config.train_vision)
        for name, weight in self.language_model.named_parameters():
            # with adapters, the language model's own weights stay as they are
            weight.requires_grad_(not config.lora_rank or ADAPTER_MARK in name)
        if config.action_rows == "frozen_tied":
            self.get_input_embeddings().requires_grad_(False)
            logger.warning(
                "action_rows is 'frozen_tied': the head's rows are words that cannot be moved; a "
                "policy trained so stopped at 29% of the tokens. Choose 'trained' unless you study "
                "just that"
            )

    @property
    def decoder(self) -> nn.Module:
        """The language model, which has no head."""
        return self.language_model

    def add_adapters(self, *, rank: int, alpha: int, targets: LoraTargets) -> None:
        """See `TokenModel.add_adapters`.

        Both targets mean the language model's layers: the projector and the action rows were new
        before fine-tuning, and they stay fully trained.
        """
        add_adapters(self.decoder, rank=rank, alpha=alpha)

    def merged_config(self) -> ScratchVLAConfig:
        """Return the configuration of the model with its adapters merged."""
        config = deepcopy(self.config)
        config.lora_rank = 0
        return config

    def forward(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        action_tokens: Tensor | None = None,
        sampler: ActionSampler | None = None,
        with_nll: bool = False,
    ) -> ActionLogits:
        """Score ``action_tokens``, or sample them; FSDP wraps this method.

        Args:
            pixel_values: [B, V * towers * 3, H, W], normalised.
            input_ids: [B, L] prompts, padded on the right.
            attention_mask: [B, L], 1 for prompt and 0 for padding; None without padding.
            action_tokens: [B, T] int64; token k's logits are conditioned on the bins before it.
                Parallel decoding does not need them.
            sampler: samples a bin for every token.
            with_nll: score ``action_tokens`` over all bins; the head has no rows for other words.

        Raises:
            ContractError: decoding is autoregressive and not exactly one of ``action_tokens`` and
                ``sampler`` is given.
        """
        prefix = self._prefix(pixel_values, input_ids, attention_mask)
        if self.config.decoding == "parallel":
            logits = self._score_at_once(prefix, self._blank(prefix), causal=False)
        elif action_tokens is not None and sampler is None:
            # the last token is the input of no other
            inputs = self._embed(action_tokens[:, :-1]).to(prefix.embeddings.dtype)
            logits = self._score_at_once(prefix, inputs, causal=True)
        elif sampler is not None and action_tokens is None:
            return self._decode_autoregressive(prefix, sampler)
        else:
            raise ContractError(
                "autoregressive decoding scores the bins it is given or chooses its own; give "
                "either bins or a sampler"
            )
        answer = ActionLogits(logits=logits)
        if sampler is not None:
            answer.action_tokens = sampler.sample(logits)
        if with_nll:
            assert action_tokens is not None
            # [B, T, C] -> [B, C, T], as cross_entropy expects its classes
            answer.nll = functional.cross_entropy(
                logits.transpose(1, 2), action_tokens, reduction="none"
            )
        return answer

    def get_input_embeddings(self) -> nn.Module:
        """Return the language model's table of token embeddings."""
        return self.language_model.get_input_embeddings()

    def _prefix(
        self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor | None
    ) -> Prefix:
        """Concatenate patches and prompts, all in the dtype of the language model.

        Under autocast a layer's output may have another dtype than its weights, so every part gets
        its input, and the language model its sequence, cast to the dtype of its weights.
        """
        ids, is_word = align_right(input_ids, attention_mask)
        words: Tensor = self.get_input_embeddings()(ids)
        features = self._features(pixel_values)
        patches = self.projector(features.to(self.projector.fc1.weight.dtype))
        # less one: the last action token needs no position
        self._check_length(patches.shape[1] + ids.shape[1] + self.config.num_action_tokens - 1)
        return Prefix(
            torch.cat([patches.to(words.dtype), words], dim=1),
            torch.cat([is_word.new_ones(patches.shape[:2]), is_word], dim=1),
        )

    def _features(self, pixel_values: Tensor) -> Tensor:
        """Return the towers' features, concatenated: [B, V * patches, sum of the widths]."""
        num_towers = len(self.vision_towers)
        # [B, V * towers * 3, H, W] -> [B, V, towers, 3, H, W]
        views = pixel_values.unflatten(1, (self.config.num_views, num_towers, 3))
        by_tower = [
            tower(views[:, :, position].flatten(0, 1)).last_hidden_state
            for position, tower in enumerate(self.vision_towers)
        ]
        # [B * V, patches, width] of each tower -> [B, V * patches, sum of the widths]
        return torch.cat(by_tower, dim=-1).unflatten(0, views.shape[:2]).flatten(1, 2)

    def _score_at_once(self, prefix: Prefix, inputs: Tensor, *, causal: bool) -> Tensor:
        """Return the logits [B, T, C], given the inputs of all action tokens but the last."""
        sequence = torch.cat([prefix.embeddings, inputs], dim=1)
        is_token = torch.cat([prefix.is_token, _all_true(inputs)], dim=1)
        hidden = self._encode(sequence, is_token, causal=causal)
        # from the last word on, which scores the first action token
        return self._score(hidden[:, prefix.embeddings.shape[1] - 1 :])

    def _decode_autoregressive(self, prefix: Prefix, sampler: ActionSampler) -> ActionLogits:
        """Sample one token after the other, with a cache of keys and values."""
        cache = DynamicCache()
        inputs, is_token = prefix.embeddings, prefix.is_token
        logits: list[Tensor] = []
        action_tokens: list[Tensor] = []
        for position in range(self.config.num_action_tokens):
            # the first pass runs the whole prefix, each later one a single token
            if position:
                inputs = self._embed(action_tokens[-1]).to(prefix.embeddings.dtype)
                is_token = torch.cat([is_token, _all_true(inputs)], dim=1)
            hidden = self._encode(inputs, is_token, causal=True, cache=cache)
            logits.append(self._score(hidden[:, -1:]))
            action_tokens.append(sampler.sample(logits[-1], position))
        return ActionLogits(
            logits=torch.cat(logits, dim=1), action_tokens=torch.cat(action_tokens, dim=1)
        )

    def _encode(
        self, inputs: Tensor, is_token: Tensor, *, causal: bool, cache: Cache | None = None
    ) -> Tensor:
        """Run the language model on the last positions of a sequence.

        Args:
            inputs: [B, Q, D], embeddings at the last Q positions.
            is_token: [B, S] bool, for all positions.
            causal: whether a position attends only to itself and those before it.
            cache: holds the positions before the last Q; these are added to it.

        Returns:
            [B, Q, D].
        """
        num_queries = inputs.shape[1]
        # padding takes up no position, so a prompt has the same ones in every batch
        positions = is_token.long().cumsum(1).sub(1).clamp(min=0)
        output = self.language_model(
            inputs_embeds=inputs,
            attention_mask=pairwise_mask(is_token, num_queries, causal=causal, dtype=inputs.dtype),
            position_ids=positions[:, -num_queries:],
            past_key_values=cache,
            use_cache=cache is not None,
        )
        return output.last_hidden_state

    def _blank(self, prefix: Prefix) -> Tensor:
        batch, _, width = prefix.embeddings.shape
        return prefix.embeddings.new_zeros(batch, self.config.num_action_tokens - 1, width)

    def _embed(self, action_tokens: Tensor) -> Tensor:
        if self.config.action_rows == "trained":
            return embed_action_tokens(self.action_tokens.embedding.weight, action_tokens)
        return embed_action_tokens(self._vocabulary_rows(), action_tokens)

    def _score(self, hidden: Tensor) -> Tensor:
        if self.config.action_rows == "trained":
            return score_action_tokens(self.action_tokens.head.weight, hidden)
        return score_action_tokens(self._vocabulary_rows(), hidden)

    def _vocabulary_rows(self) -> Tensor:
        """Return [C, D], the action ids' rows of the language model's embedding."""
        first = self.config.first_action_id
        assert first is not None
        table: Any = self.get_input_embeddings()
        return table.weight[first : first + self.config.n_action_bins]

    def _check_length(self, length: int) -> None:
        longest = self.config.language.max_position_embeddings
        if length > longest:
            raise ContractError(
                f"patches, prompt and actions make a sequence of {length}; the language model has "
                f"{longest} positions"
            )

    def _require_attention(self) -> None:
        backend = self.config.language._attn_implementation
        if backend not in ATTENTION:
            raise ConfigError(
                f"attn_implementation is '{backend}', which leaves a mask for every pair of tokens "
                f"unheeded; choose one of {ATTENTION}"
            )


class Projector(nn.Module):
    """Projection of patch features to the language model's width; two layers, as in LLaVA-1.5."""

    def __init__(self, vision_width: int, language_width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(vision_width, language_width)
        self.fc2 = nn.Linear(language_width, language_width)

    def forward(self, features: Tensor) -> Tensor:
        """Map [..., vision_width] to [..., language_width]."""
        return self.fc2(functional.gelu(self.fc1(features)))


def _all_true(inputs: Tensor) -> Tensor:
    return torch.ones(inputs.shape[:2], dtype=torch.bool, device=inputs.device)


def register_auto_classes() -> None:
    """Register the model with transformers' Auto classes, for ``model_type: scratch_vla``."""
    AutoConfig.register(ScratchVLAConfig.model_type, ScratchVLAConfig, exist_ok=True)
    AutoModel.register(ScratchVLAConfig, ScratchVLAModel, exist_ok=True)
