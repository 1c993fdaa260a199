"""The sizes of an OpenVLA-OFT checkpoint, read from the published ``config.json`` unchanged."""

from dataclasses import asdict, dataclass
from typing import Any, cast

from transformers import LlamaConfig, PreTrainedConfig

from verl_vla.core.errors import ConfigError
from verl_vla.core.text import nearest
from verl_vla.policies.base import PolicyShape
from verl_vla.policies.normalization import COLUMNS, Normalization

ARCHITECTURE = "no-align+fused-gelu-mlp"
"""The only projector that OpenVLA's checkpoints use: three layers with GELU between them."""


@dataclass(frozen=True, kw_only=True)
class VisionTower:
    """The sizes of one vision transformer."""

    patch_size: int
    """Height and width of a patch, pixels."""
    hidden_size: int
    depth: int
    """Number of stored blocks; the last one never runs."""
    heads: int
    mlp_size: int
    class_token: bool
    registers: int
    """Number of extra tokens after the class token; they have no position and are dropped at the
    end."""
    layer_scale: bool
    attention_pool: bool
    """True where a pooling head is stored; it never runs."""


PUBLISHED_TOWERS = {
    "vit_large_patch14_reg4_dinov2.lvd142m": VisionTower(
        patch_size=14,
        hidden_size=1024,
        depth=24,
        heads=16,
        mlp_size=4096,
        class_token=True,
        registers=4,
        layer_scale=True,
        attention_pool=False,
    ),
    "vit_so400m_patch14_siglip_224": VisionTower(
        patch_size=14,
        hidden_size=1152,
        depth=27,
        heads=16,
        mlp_size=4304,
        class_token=False,
        registers=0,
        layer_scale=False,
        attention_pool=True,
    ),
}
"""Sizes of the vision towers, which published checkpoints give only as timm's ids. Source: timm
0.9.10, ``vision_transformer.py``. Every checkpoint has DINOv2 first and SigLIP second."""
PUBLISHED_IMAGE_SIZE = 224
"""Image size, pixels. Source: openvla-oft, ``prismatic/extern/hf/configuration_prismatic.py``."""
PUBLISHED_VOCAB_SIZE = 32064
PUBLISHED_PAD_TOKEN_ID = 32000
PUBLISHED_PAD_TO_MULTIPLE_OF = 64
"""Llama 2's vocabulary, one padding token, and rows up to the next multiple. Same source."""
PUBLISHED_ACTION_BINS = 256
LIBERO_CHUNK_LENGTH = 8
LIBERO_ACTION_DIM = 7
"""Sizes of fine-tuning on LIBERO, which the published config.json lacks. Source: openvla-oft,
``prismatic/vla/constants.py``."""


class OpenVLAOFTConfig(PreTrainedConfig):
    """Configuration of an OpenVLA-OFT model.

    Published checkpoints name their vision towers in ``timm_model_ids``; others define them in
    ``vision_towers``, a list of mappings with the fields of `VisionTower`. The language model's
    attention is always bidirectional; the file's value is ignored.

    Chunk and action have LIBERO's sizes where the file has none. To the file of a checkpoint for
    another robot, add the entries of ``policy_sizes`` of its suite, e.g. of
    `verl_vla.envs.robotwin.RoboTwin`; the published code read them from an environment variable.

    Raises:
        ConfigError: if the file describes a model that this code does not compute.
    """

    model_type = "openvla"
    # by it transformers hands the choice of attention on to the language model
    sub_configs = {"text_config": LlamaConfig}

    text_config: LlamaConfig | dict[str, Any] | None = None
    timm_model_ids: list[str] | tuple[str, ...] | None = None
    vision_towers: list[Any] | tuple[Any, ...] | None = None
    image_sizes: list[int] | tuple[int, ...] | None = None
    timm_override_act_layers: list[str | None] | tuple[str | None, ...] | None = None
    arch_specifier: str = ARCHITECTURE
    use_fused_vision_backbone: bool | None = None
    n_action_bins: int = PUBLISHED_ACTION_BINS
    pad_to_multiple_of: int = PUBLISHED_PAD_TO_MULTIPLE_OF
    num_images_in_input: int = 1
    chunk_length: int = LIBERO_CHUNK_LENGTH
    action_dim: int = LIBERO_ACTION_DIM
    use_proprio: bool = False
    proprio_dim: int = 0
    action_proprio_normalization_type: str = "bounds_q99"
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    layer_scale_init: float = 1e-5
    position_embedding_std: float = 0.02

    def __post_init__(self, **kwargs: Any) -> None:
        if self.timm_model_ids is None and self.vision_towers is None:
            self.timm_model_ids = list(PUBLISHED_TOWERS)
        self.vision_towers = _spell_out(self.vision_towers)
        if self.image_sizes is None:
            self.image_sizes = [PUBLISHED_IMAGE_SIZE] * len(self.towers)
        if self.use_fused_vision_backbone is None:
            self.use_fused_vision_backbone = len(self.towers) > 1
        self.text_config = _text_config(self.text_config)
        # transformers 5 builds its attention mask by this flag
        self.text_config.is_causal = False
        kwargs.pop("auto_map", None)  # names remote code, which a saved copy would not hold
        super().__post_init__(**kwargs)
        self._check_architecture()
        self._check_images()
        self._check_vocabulary()

    @property
    def towers(self) -> tuple[VisionTower, ...]:
        """The vision towers in the order of the pixel channels."""
        if self.vision_towers is not None:
            return tuple(VisionTower(**tower) for tower in self.vision_towers)
        names = list(self.timm_model_ids or ())
        unknown = [name for name in names if name not in PUBLISHED_TOWERS]
        if unknown:
            raise ConfigError(
                f"timm_model_ids holds {unknown}, whose sizes are not known here; choose from "
                f"{list(PUBLISHED_TOWERS)} or spell them out in vision_towers"
            )
        return tuple(PUBLISHED_TOWERS[name] for name in names)

    @property
    def language(self) -> LlamaConfig:
        """The language model's configuration."""
        assert isinstance(self.text_config, LlamaConfig)
        return self.text_config

    @property
    def image_size(self) -> int:
        """Height and width of every image, pixels."""
        return list(self.image_sizes or ())[0]

    @property
    def num_patches(self) -> int:
        """Number of image tokens of one policy step, over all views."""
        return self.num_images_in_input * (self.image_size // self.towers[0].patch_size) ** 2

    @property
    def num_action_tokens(self) -> int:
        """T, number of action tokens of one policy step."""
        return self.chunk_length * self.action_dim

    @property
    def first_action_id(self) -> int:
        """Token id of bin 0; the action ids are the last ones before the padding rows."""
        return self.language.vocab_size - self.pad_to_multiple_of - self.n_action_bins

    @property
    def stop_id(self) -> int:
        """Token id that ends a sequence, after the action slots."""
        stop = self.language.eos_token_id
        if not isinstance(stop, int):
            raise ConfigError(f"text_config.eos_token_id is {stop}; exactly one id is needed")
        return stop

    @property
    def shape(self) -> PolicyShape:
        """The sizes that the rest of the system must match."""
        return PolicyShape(
            num_views=self.num_images_in_input,
            image_size=self.image_size,
            chunk_length=self.chunk_length,
            action_dim=self.action_dim,
            num_bins=self.n_action_bins,
            proprio_dim=self.proprio_dim if self.use_proprio else 0,
        )

    @property
    def normalization(self) -> Normalization:
        """Normalization of actions and proprio, which defines the values of -1 and +1."""
        return cast("Normalization", self.action_proprio_normalization_type)

    def _check_architecture(self) -> None:
        if self.arch_specifier != ARCHITECTURE:
            raise ConfigError(
                f"arch_specifier is '{self.arch_specifier}'; only '{ARCHITECTURE}' is built here"
            )
        if self.use_fused_vision_backbone != (len(self.towers) > 1):
            raise ConfigError(
                f"use_fused_vision_backbone is {self.use_fused_vision_backbone} with "
                f"{len(self.towers)} vision towers; towers are fused when there are several"
            )
        if any(layer is not None for layer in self.timm_override_act_layers or ()):
            raise ConfigError(
                f"timm_override_act_layers is {self.timm_override_act_layers}; only the towers' "
                "own exact GELU is computed here, so every entry must be null"
            )

    def _check_images(self) -> None:
        sizes, towers = list(self.image_sizes or ()), self.towers
        if not 1 <= len(towers) <= 2:
            raise ConfigError(f"there are {len(towers)} vision towers; one or two can be built")
        if len(sizes) != len(towers) or len(set(sizes)) != 1:
            raise ConfigError(
                f"image_sizes is {sizes} for {len(towers)} vision towers; every tower sees the "
                "same image, so give one number a tower, all equal"
            )
        if len({tower.patch_size for tower in towers}) != 1 or sizes[0] % towers[0].patch_size:
            raise ConfigError(
                f"images of {sizes[0]} px do not fall into patches of "
                f"{[tower.patch_size for tower in towers]} px; towers must share a patch size that "
                "divides the image size"
            )

    def _check_vocabulary(self) -> None:
        sizes = {
            "n_action_bins": (self.n_action_bins, 2),
            "chunk_length": (self.chunk_length, 1),
            "action_dim": (self.action_dim, 1),
            "num_images_in_input": (self.num_images_in_input, 1),
        }
        if self.use_proprio:
            sizes["proprio_dim"] = (self.proprio_dim, 1)
        if self.action_proprio_normalization_type not in COLUMNS:
            known = nearest(self.action_proprio_normalization_type, list(COLUMNS))
            raise ConfigError(
                f"action_proprio_normalization_type is {self.action_proprio_normalization_type!r}, "
                f"which cannot be undone here; {known}"
            )
        for name, (value, least) in sizes.items():
            if value < least:
                raise ConfigError(f"{name} is {value}; it must be at least {least}")
        # action ids lie right before the padding; too many bins would reach the special tokens
        if self.first_action_id <= self.stop_id:
            raise ConfigError(
                f"text_config.vocab_size is {self.language.vocab_size}, of which "
                f"{self.pad_to_multiple_of} are padding and {self.n_action_bins} actions; the "
                f"first action id would be {self.first_action_id}, which is a text token"
            )


def _spell_out(towers: Any) -> list[dict[str, Any]] | None:
    """Check the fields of the towers and return the towers in a form that JSON can hold."""
    if towers is None:
        return None
    try:
        # dataclass to mapping and back: an unknown field raises TypeError
        return [asdict(VisionTower(**t)) if isinstance(t, dict) else asdict(t) for t in towers]
    except TypeError as error:
        raise ConfigError(f"vision_towers is {towers}; {error}") from error


def _text_config(given: LlamaConfig | dict[str, Any] | None) -> LlamaConfig:
    if given is None:
        # all other sizes are LlamaConfig's defaults, rms_norm_eps 1e-6 among them
        return LlamaConfig(vocab_size=PUBLISHED_VOCAB_SIZE, pad_token_id=PUBLISHED_PAD_TOKEN_ID)
    if isinstance(given, LlamaConfig):
        return given
    return LlamaConfig(**{key: value for key, value in given.items() if key != "model_type"})
