"""Configuration of a scratch VLA, stored as the ``config.json`` of its folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from transformers import AutoConfig, PreTrainedConfig, Qwen2Config, SiglipVisionConfig

from verl_vla.config.choices import ACTION_ROWS, DECODINGS
from verl_vla.config.shared import LORA_ALPHA
from verl_vla.core.errors import ConfigError
from verl_vla.policies import checkpoint
from verl_vla.policies.base import PolicyShape


class ScratchVLAConfig(PreTrainedConfig):
    """Configuration of a scratch VLA.

    Args:
        text_config: configuration of the language model, with its ``model_type``.
        vision_config: configuration of the SigLIP tower.
        second_vision_config: configuration of a second tower for the same images, or None.
        decoding: one of `DECODINGS`.
        action_rows: one of `ACTION_ROWS`.
        first_action_id: token id of bin 0. None takes the last rows of the vocabulary, which is
            right only where none of them is padding; see `find_first_action_id`.
        n_action_bins: C, number of classes per action token.
        num_views: V, number of images per policy step.
        chunk_length: K, number of actions per policy step.
        action_dim: A, number of values per action.
        lora_rank: rank of adapters on the language model's linear layers, whose weights are then
            frozen; 0 trains the language model itself.
        train_vision: whether the vision towers are trained.

    Raises:
        ConfigError: if the parts do not fit together.
    """

    model_type = "scratch_vla"
    sub_configs: ClassVar[dict[str, Any]] = {
        "text_config": AutoConfig,
        "vision_config": SiglipVisionConfig,
        "second_vision_config": SiglipVisionConfig,
    }

    text_config: PreTrainedConfig | dict[str, Any] | None = None
    vision_config: SiglipVisionConfig | dict[str, Any] | None = None
    second_vision_config: SiglipVisionConfig | dict[str, Any] | None = None
    decoding: str = "parallel"
    action_rows: str = "trained"
    first_action_id: int | None = None
    n_action_bins: int = 256
    num_views: int = 1
    chunk_length: int = 8
    action_dim: int = 7
    lora_rank: int = 0
    lora_alpha: int = LORA_ALPHA
    train_vision: bool = False
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        self.text_config = _language(self.text_config)
        self.vision_config = _tower(self.vision_config or {})
        if self.second_vision_config is not None:
            self.second_vision_config = _tower(self.second_vision_config)
        if self.first_action_id is None:
            self.first_action_id = self.language.vocab_size - self.n_action_bins
        super().__post_init__(**kwargs)
        self._check_choices()
        self._check_sizes()
        self._check_vocabulary()

    @property
    def language(self) -> Any:
        """The language model's configuration."""
        assert isinstance(self.text_config, PreTrainedConfig)
        return self.text_config

    @property
    def towers(self) -> tuple[SiglipVisionConfig, ...]:
        """The vision towers' configurations in the order of the pixel channels."""
        both = (self.vision_config, self.second_vision_config)
        return tuple(tower for tower in both if isinstance(tower, SiglipVisionConfig))

    @property
    def image_size(self) -> int:
        """Height and width of every image, pixels."""
        size: Any = self.towers[0].image_size  # SigLIP's config would also take two numbers
        return size

    @property
    def num_patches(self) -> int:
        """Number of image tokens of one policy step, over all views."""
        patch_size: Any = self.towers[0].patch_size
        return self.num_views * (self.image_size // patch_size) ** 2

    @property
    def num_action_tokens(self) -> int:
        """T, number of action tokens of one policy step."""
        return self.chunk_length * self.action_dim

    @property
    def shape(self) -> PolicyShape:
        """The sizes that the rest of the system must match."""
        return PolicyShape(
            num_views=self.num_views,
            image_size=self.image_size,
            chunk_length=self.chunk_length,
            action_dim=self.action_dim,
            num_bins=self.n_action_bins,
        )

    def _check_choices(self) -> None:
        if self.decoding not in DECODINGS:
            raise ConfigError(f"decoding is {self.decoding!r}; choose one of {DECODINGS}")
        if self.action_rows not in ACTION_ROWS:
            raise ConfigError(f"action_rows is {self.action_rows!r}; choose one of {ACTION_ROWS}")
        if self.action_rows == "frozen_tied" and not self.language.tie_word_embeddings:
            raise ConfigError(
                "action_rows is 'frozen_tied', but the language model's tie_word_embeddings is "
                "false; only a head that is its embedding can be used as one: choose 'trained'"
            )

    def _check_sizes(self) -> None:
        sizes = {
            "n_action_bins": (self.n_action_bins, 2),
            "num_views": (self.num_views, 1),
            "chunk_length": (self.chunk_length, 1),
            "action_dim": (self.action_dim, 1),
            "lora_rank": (self.lora_rank, 0),
            "lora_alpha": (self.lora_alpha, 1),
        }
        for name, (value, least) in sizes.items():
            if value < least:
                raise ConfigError(f"{name} is {value}; it must be at least {least}")
        if self.num_views > 2:
            raise ConfigError(f"num_views is {self.num_views}; a robot here has one or two cameras")
        grids = {(tower.image_size, tower.patch_size) for tower in self.towers}
        if len(grids) != 1:
            raise ConfigError(
                f"the vision towers have (image, patch) sizes {sorted(grids)}; their features are "
                "put side by side patch by patch: take towers of one image and patch size"
            )

    def _check_vocabulary(self) -> None:
        first, rows = self.first_action_id, self.language.vocab_size
        assert first is not None
        if not 0 <= first <= rows - self.n_action_bins:
            raise ConfigError(
                f"action ids would run from {first} to {first + self.n_action_bins - 1}, but the "
                f"vocabulary has rows 0 to {rows - 1}; a look-up outside them reads other memory "
                "on a GPU: set first_action_id to what find_first_action_id says"
            )


def _language(given: PreTrainedConfig | dict[str, Any] | None) -> PreTrainedConfig:
    if given is None:
        return Qwen2Config()
    if isinstance(given, PreTrainedConfig):
        return given
    if "model_type" not in given:
        raise ConfigError("text_config names no model_type; say which language model it is of")
    return AutoConfig.for_model(**given)


def _tower(given: SiglipVisionConfig | dict[str, Any]) -> SiglipVisionConfig:
    tower = SiglipVisionConfig(**given) if isinstance(given, dict) else given
    tower.vision_use_head = False  # the head pools an image into one vector; patches are needed
    return tower


def read_config(folder: str | Path) -> ScratchVLAConfig:
    """Read the configuration of a checkpoint.

    Raises:
        ConfigError: if the folder or its ``config.json`` is missing, or the parts do not fit.
    """
    return checkpoint.read_config(ScratchVLAConfig, folder)
