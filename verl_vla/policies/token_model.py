"""Base class of the models of all token-action policies: loading, freezing and adapters."""

from __future__ import annotations

from abc import abstractmethod
from copy import deepcopy
from typing import Any, TypeVar

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from verl_vla.config.choices import LoraTargets
from verl_vla.policies.weight_files import require_all_weights

Model = TypeVar("Model", bound="TokenModel")


class TokenModel(PreTrainedModel):
    """Model that scores or samples the action tokens of one chunk, given images and a prompt."""

    base_model_prefix = ""
    main_input_name = "pixel_values"
    supports_gradient_checkpointing = True
    _supports_sdpa = True

    @classmethod
    def from_pretrained(cls: type[Model], folder: Any, *args: Any, **kwargs: Any) -> Model:
        """Load config and weights, and no other file of the folder.

        The arguments are those of `PreTrainedModel.from_pretrained`.

        Raises:
            ConfigError: if a weight is missing, superfluous or of another shape.
        """
        # transformers only warns about weights that do not fit; the report names them
        kwargs["output_loading_info"] = True
        loaded: Any = super().from_pretrained(folder, *args, **kwargs)
        model, report = loaded
        require_all_weights(folder, report)
        model.freeze_untrained()  # loading makes every parameter trainable again
        return model

    @abstractmethod
    def freeze_untrained(self) -> None:
        """Freeze the weights that are not trained."""

    @property
    @abstractmethod
    def decoder(self) -> nn.Module:
        """The layers of the language model, without its head."""

    @abstractmethod
    def add_adapters(self, *, rank: int, alpha: int, targets: LoraTargets) -> None:
        """Freeze trained layers and add LoRA adapters to them; see `policies.lora`.

        Args:
            rank: rank of the adapters.
            alpha: numerator of the adapters' scale, ``alpha / rank``.
            targets: the decoder's linear layers, or those of every part that was trained before.
        """

    def merged_config(self) -> PreTrainedConfig:
        """Return the configuration of the model with its adapters merged."""
        return deepcopy(self.config)
