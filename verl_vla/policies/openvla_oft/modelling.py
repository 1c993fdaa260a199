"""OpenVLA-OFT in its token form, on transformers' own Llama, with the published key names.

One forward pass scores every action token of a chunk. The sequence is

    BOS | image patches | proprio | rest of the prompt | T zero vectors | stop | padding

where proprio is one token, present only in a policy that reads proprio. Every token attends to all
others except padding. The logits of action token ``k`` are read one position before its zero
vector, for the action ids only. Source: openvla-oft, ``prismatic/extern/hf/modeling_prismatic.py``,
with the attention of its transformers fork.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaForCausalLM
from transformers import initialization as init
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.utils.import_utils import is_flash_attn_2_available

from verl_vla.config.choices import LoraTargets
from verl_vla.core.errors import ConfigError, ContractError
from verl_vla.policies.base import ActionLogits, ActionSampler
from verl_vla.policies.lora import ADAPTER_MARK, add_adapters, head_rows
from verl_vla.policies.openvla_oft.configuration import OpenVLAOFTConfig
from verl_vla.policies.openvla_oft.sequence import move_padding_last, prompt_lengths, read
from verl_vla.policies.openvla_oft.vision import (
    AttentionPool,
    FusedVisionBackbone,
    LayerScale,
    Projector,
    VisionTransformer,
)
from verl_vla.policies.token_model import TokenModel


class ProprioProjector(nn.Module):
    """Projection of proprio to the language model's width."""

    def __init__(self, config: OpenVLAOFTConfig) -> None:
        super().__init__()
        width = config.language.hidden_size
        self.fc1 = nn.Linear(config.proprio_dim, width)
        self.fc2 = nn.Linear(width, width)

    def forward(self, proprio: Tensor | None) -> Tensor:
        """Map [B, P], normalised, to one token [B, 1, D].

        Raises:
            ContractError: ``proprio`` is None.
        """
        if proprio is None:
            raise ContractError("the policy reads proprio, but none was given with the images")
        return self.fc2(functional.gelu(self.fc1(proprio)))[:, None]


FLASH_ATTENTION = "flash_attention_2"
BIDIRECTIONAL_ATTENTION = ("sdpa", "eager", FLASH_ATTENTION)
"""Back ends of transformers 5 that obey ``is_causal=False`` with and without padding. The first two
read it from the mask, flash attention from the flag of the config and of every ``self_attn``
(``integrations/flash_attention.py``); it removes padding by the same mask."""


def require_bidirectional_backend(backend: str | None) -> None:
    """Refuse a back end that would silently be causal, or that this machine does not have.

    Raises:
        ConfigError: the back end is unsuitable; names the suitable ones, or what is missing.
    """
    if backend not in BIDIRECTIONAL_ATTENTION:
        raise ConfigError(
            f"attn_implementation is '{backend}'; OpenVLA-OFT needs attention in both directions, "
            f"which is ensured for {BIDIRECTIONAL_ATTENTION}: choose one of them"
        )
    require_backend(backend)


def require_backend(backend: str | None) -> None:
    """Refuse a back end that this machine does not have.

    Without this check transformers would look for a substitute on a hub.

    Raises:
        ConfigError: a CUDA device or a package is missing.
    """
    if backend == FLASH_ATTENTION and not is_flash_attn_2_available():
        raise ConfigError(
            f"attn_implementation is '{FLASH_ATTENTION}', which needs a CUDA device and the "
            "package flash-attn, and one of them is missing here; install it (the extra gpu), or "
            "choose sdpa"
        )


class OpenVLAOFTModel(TokenModel):
    """Model that scores the action tokens of one chunk, given images and a prompt."""

    config_class = OpenVLAOFTConfig
    _supports_flash_attn = True
    # the layers that FSDP shards and checkpointing recomputes one by one
    _no_split_modules = ["LlamaDecoderLayer", "Block"]

    config: OpenVLAOFTConfig

    def __init__(self, config: OpenVLAOFTConfig) -> None:
        require_backend(config._attn_implementation)  # pyright: ignore[reportPrivateUsage]
        super().__init__(config)
        self.vision_backbone = FusedVisionBackbone(config)
        self.projector = Projector(self.vision_backbone.hidden_size, config.language.hidden_size)
        if config.use_proprio:
            self.proprio_projector = ProprioProjector(config)
        self.language_model = LlamaForCausalLM(config.language)
        for layer in _layers(self.language_model):
            # transformers' flash attention reads this flag, the others read the mask
            layer.self_attn.is_causal = False
        self.post_init()
        self.freeze_untrained()
        require_bidirectional(self)

    def freeze_untrained(self) -> None:
        """Freeze the weights that never run."""
        for tower in self.vision_backbone.towers:
            tower.freeze_unused()

    @property
    def decoder(self) -> nn.Module:
        """The layers of the language model, without its head."""
        return self.language_model.model

    def add_adapters(self, *, rank: int, alpha: int, targets: LoraTargets) -> None:
        """See `TokenModel.add_adapters`; ``all-linear`` includes head, projector and towers."""
        part = self.decoder if targets == "language_model" else self
        add_adapters(part, rank=rank, alpha=alpha)
        # what got no adapter is frozen as well
        for name, weight in self.named_parameters():
            weight.requires_grad_(ADAPTER_MARK in name)

    def action_logits(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        proprio: Tensor | None = None,
    ) -> Tensor:
        """Score every bin of every action token.

        Args:
            pixel_values: [B, V * towers * 3, H, W], normalised.
            input_ids: [B, L] prompts, padded on the right.
            attention_mask: [B, L], 1 for prompt and 0 for padding; None without padding.
            proprio: [B, P], normalised, for a policy that reads it; else None.

        Returns:
            [B, T, C] float32.
        """
        return self(pixel_values, input_ids, attention_mask, proprio=proprio).logits

    def forward(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        action_tokens: Tensor | None = None,
        sampler: ActionSampler | None = None,
        with_nll: bool = False,
        proprio: Tensor | None = None,
    ) -> ActionLogits:
        """Compute the logits of `action_logits`; FSDP and adapters wrap this method.

        Args:
            pixel_values: see `action_logits`.
            input_ids: see `action_logits`.
            attention_mask: see `action_logits`.
            action_tokens: [B, T] int64, needed only for `ActionLogits.nll`, since no token of a
                chunk depends on another one's bin.
            sampler: if given, samples a bin for every token.
            with_nll: score ``action_tokens`` and the stop after them over the complete vocabulary,
                as in openvla-oft's fine-tuning.
            proprio: see `action_logits`.
        """
        hidden = self._encode(pixel_values, input_ids, attention_mask, proprio, with_stop=with_nll)
        if with_nll:
            assert action_tokens is not None
            return self._sft_forward(hidden, action_tokens)
        logits = self._score(hidden)
        return ActionLogits(
            logits=logits, action_tokens=None if sampler is None else sampler.sample(logits)
        )

    def action_mass(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        proprio: Tensor | None = None,
    ) -> Tensor:
        """Return the share of the vocabulary's probability that is on the action ids.

        It is near 1 for a model that was trained on action tokens, near 0 for one whose actions
        come from a regression head. The arguments are those of `action_logits`.

        Returns:
            [B, T] float32, 0 to 1.
        """
        of_all = self._score_all(self._encode(pixel_values, input_ids, attention_mask, proprio))
        # a ratio of sums of exponentials, in logarithms, so that nothing overflows
        return (of_all[..., self._action_ids].logsumexp(-1) - of_all.logsumexp(-1)).exp()

    @property
    def _action_ids(self) -> slice:
        start = self.config.first_action_id
        return slice(start, start + self.config.n_action_bins)

    def _sft_forward(self, hidden: Tensor, action_tokens: Tensor) -> ActionLogits:
        """Score demonstrated bins and the stop, given their hidden states [B, T + 1, D]."""
        of_all = self._score_all(hidden)
        stop = action_tokens.new_full((len(action_tokens), 1), self.config.stop_id)
        labels = torch.cat([self.config.first_action_id + action_tokens, stop], dim=1)
        # [B, T + 1, words] -> [B, words, T + 1], as cross_entropy expects its classes
        nll = functional.cross_entropy(of_all.transpose(1, 2), labels, reduction="none")
        # without the stop, which is no action
        return ActionLogits(logits=of_all[:, :-1, self._action_ids], nll=nll)

    def _encode(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        proprio: Tensor | None,
        *,
        with_stop: bool = False,
    ) -> Tensor:
        """Run everything except the head; return the action tokens' hidden states [B, T, D].

        ``with_stop`` adds the hidden state of the stop: [B, T + 1, D].
        """
        # at each pass: a flag or a back end can be changed after the model was made
        require_bidirectional(self)
        num_prompts, num_ids = input_ids.shape
        lengths = prompt_lengths(attention_mask)
        embeddings = self._embed(input_ids)
        patches = self.projector(self.vision_backbone(pixel_values))
        if self.config.use_proprio:
            patches = torch.cat([patches, self.proprio_projector(proprio)], dim=1)
        embeddings, keep = move_padding_last(embeddings, lengths, num_ids)
        # the patches stand between BOS and the rest of the prompt
        sequence = torch.cat([embeddings[:, :1], patches, embeddings[:, 1:]], dim=1)
        self._check_length(sequence.shape[1], num_ids)
        mask = None
        # without padding there is no mask at all, and attention may use its fastest kernel
        if keep is not None:
            # BOS, patches and proprio are never padding
            front = keep.new_ones(num_prompts, 1 + patches.shape[1])
            mask = torch.cat([front, keep], dim=1).long()
        hidden = self.language_model.model(
            inputs_embeds=sequence,
            attention_mask=mask,
            # one pass for all tokens, so a cache of keys and values would only take memory
            use_cache=False,
        ).last_hidden_state
        # one before the first slot: BOS, patches and L - 1 prompt tokens come before it
        first = patches.shape[1] - 1 + (num_ids if lengths is None else lengths)
        return read(hidden, first, self.config.num_action_tokens + with_stop)

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
        # one look-up for prompt and stop; the slots between them have no embedding
        embedded = self.get_input_embeddings()(torch.cat([input_ids, stop], dim=1))
        # openvla-oft multiplies the embeddings of its action tokens by 0
        slots = embedded.new_zeros(
            len(input_ids), self.config.num_action_tokens, embedded.shape[-1]
        )
        return torch.cat([embedded[:, :-1], slots, embedded[:, -1:]], dim=1)

    def _score(self, hidden: Tensor) -> Tensor:
        """Apply the action ids' rows of the head."""
        return _score(hidden, head_rows(self.language_model.lm_head, self._action_ids))

    def _score_all(self, hidden: Tensor) -> Tensor:
        """Apply every row of the head."""
        return _score(hidden, head_rows(self.language_model.lm_head, slice(None)))

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        # the parameters that are no layer of torch, so transformers does not initialise them
        if isinstance(module, VisionTransformer):
            init.normal_(module.pos_embed, std=self.config.position_embedding_std)
            for name in module.prefix_names:
                init.normal_(module.get_parameter(name), std=self.config.initializer_range)
        elif isinstance(module, LayerScale):
            init.constant_(module.scale_factor, self.config.layer_scale_init)
        elif isinstance(module, AttentionPool):
            init.normal_(module.latent, std=self.config.initializer_range)


def require_bidirectional(model: OpenVLAOFTModel) -> None:
    """Refuse a language model whose attention would be causal.

    A causal model runs without an error and acts badly, so every setting that makes one is checked.

    Raises:
        ConfigError: the back end or ``is_causal`` is wrong; says which.
    """
    language = model.config.language
    require_bidirectional_backend(language._attn_implementation)  # pyright: ignore[reportPrivateUsage]
    layers = _layers(model.language_model)
    if language.is_causal or any(layer.self_attn.is_causal for layer in layers):
        raise ConfigError(
            "the language model's is_causal is true; OpenVLA-OFT was trained with attention in "
            "both directions: leave text_config.is_causal and every self_attn.is_causal false"
        )


def _layers(language_model: LlamaForCausalLM) -> list[LlamaDecoderLayer]:
    return cast("list[LlamaDecoderLayer]", list(language_model.model.layers))


def _score(hidden: Tensor, rows: Tensor) -> Tensor:
    """Apply float32 rows of a head in float32, under autocast too."""
    with torch.autocast(device_type=hidden.device.type, enabled=False):
        return functional.linear(hidden.float(), rows)
