"""A tiny OpenVLA-OFT that can be trained from scratch on a CPU.

The default sizes (0.8 M parameters) learn a LIBERO-like task from 340 demonstrations in about a
minute on two cores, and improve by GRPO in another.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import LlamaConfig, PreTrainedTokenizerFast

from verl_vla.policies.normalization import ActionStatistics, NormalizationStats
from verl_vla.policies.openvla_oft.configuration import OpenVLAOFTConfig, VisionTower
from verl_vla.policies.openvla_oft.modelling import OpenVLAOFTModel
from verl_vla.policies.openvla_oft.policy import OpenVLAOFTPolicy
from verl_vla.policies.openvla_oft.processor import OpenVLAOFTProcessor
from verl_vla.policies.preprocessing import DINO_STATISTICS, EMPTY_PIECE, PROMPT, SIGLIP_STATISTICS

UNKNOWN, BOS, STOP, PAD = "<unk>", "<s>", "</s>", "<pad>"
SPECIAL_PIECES = (UNKNOWN, BOS, STOP, PAD, EMPTY_PIECE)
VOCABULARY_MULTIPLE = 64
"""Number of rows that pad the vocabulary, which is also padded to a multiple of it, as published.
"""
CONTINUATION = "##"
"""WordPiece's mark of a piece that does not begin a word (BERT, arXiv 1810.04805)."""
SPELLING = string.ascii_lowercase + string.digits
"""Characters that spell a word that is not in the vocabulary."""
PUNCTUATION = string.punctuation + "‘’“”–—…"
"""Characters that are words. LIBERO-PRO's and LIBERO-Plus's sentences have the typographic ones."""
WEIGHT_STD = 0.1
"""Standard deviation of initial weights. Chosen on first frames of the mini suite, 350 steps of 16:
the lateral action's error fell from 0.76 to 0.45 at (0.1, 1.0) for weights and positions, to 0.47
at (0.15, 1.0), and to 0.69 at (0.05, 0.25); large models use 0.02."""
POSITION_STD = 1.0
"""Standard deviation of the vision tower's initial position embeddings; see `WEIGHT_STD`."""


@dataclass(frozen=True, kw_only=True)
class TinySizes:
    """Sizes of a tiny model. The defaults are the smallest that are known to learn."""

    image_size: int = 112
    render_size: int | None = None
    """Size of the camera images that the policy will be trained on, pixels."""
    patch_size: int = 14
    num_views: int = 1
    vision_width: int = 72
    vision_depth: int = 2
    """Number of blocks that run; one more is stored, as in the published layout."""
    vision_heads: int = 3
    fused: bool = False
    """Use two towers with every part of the published pair, instead of one plain tower."""
    llm_width: int = 96
    llm_depth: int = 4
    llm_heads: int = 4
    llm_mlp: int = 256
    num_bins: int = 256
    chunk_length: int = 8
    action_dim: int = 7
    proprio_dim: int = 0
    """Number of proprio values that the policy reads; 0 reads none."""


def tiny_config(tokenizer: PreTrainedTokenizerFast, sizes: TinySizes) -> OpenVLAOFTConfig:
    """Return the configuration of a model whose action ids directly follow the tokenizer's ids."""
    words_and_bins = len(tokenizer) + sizes.num_bins
    multiples = -(-words_and_bins // VOCABULARY_MULTIPLE)
    towers = _fused_towers(sizes) if sizes.fused else [_plain_tower(sizes)]
    return OpenVLAOFTConfig(
        text_config=LlamaConfig(
            # one multiple more: `first_action_id` leaves the last one out, as padding
            vocab_size=(multiples + 1) * VOCABULARY_MULTIPLE,
            hidden_size=sizes.llm_width,
            intermediate_size=sizes.llm_mlp,
            num_hidden_layers=sizes.llm_depth,
            num_attention_heads=sizes.llm_heads,
            bos_token_id=SPECIAL_PIECES.index(BOS),
            eos_token_id=SPECIAL_PIECES.index(STOP),
            pad_token_id=SPECIAL_PIECES.index(PAD),
            initializer_range=WEIGHT_STD,
        ),
        vision_towers=towers,
        image_sizes=[sizes.image_size] * len(towers),
        pad_to_multiple_of=VOCABULARY_MULTIPLE,
        n_action_bins=sizes.num_bins,
        num_images_in_input=sizes.num_views,
        chunk_length=sizes.chunk_length,
        action_dim=sizes.action_dim,
        use_proprio=sizes.proprio_dim > 0,
        proprio_dim=sizes.proprio_dim,
        initializer_range=WEIGHT_STD,
        position_embedding_std=POSITION_STD,
        # at the default of 1e-5 an untrained block would have next to no effect
        layer_scale_init=1.0,
    )


def build_tokenizer(instructions: Sequence[str]) -> PreTrainedTokenizerFast:
    """Build a WordPiece tokenizer of the words in the prompts of ``instructions``.

    A word is a run of letters and digits or a single other character, and is one piece. A word of
    another instruction, such as a paraphrase, is split into the longest pieces that fit, down to
    single characters (`SPELLING`), and accents are dropped, so every English sentence can be
    tokenised. Pieces are numbered alphabetically, after the special ones: the same tasks give the
    same ids.
    """
    splitter = pre_tokenizers.BertPreTokenizer()
    # the words of the template are among them
    words = {
        word
        for instruction in instructions
        for word, _ in splitter.pre_tokenize_str(PROMPT.format(instruction=instruction.lower()))
    }
    spelling = [*SPELLING, *(CONTINUATION + character for character in SPELLING)]
    pieces = [*SPECIAL_PIECES, *sorted({*words, *spelling, *PUNCTUATION})]
    ids = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(
        models.WordPiece(ids, unk_token=UNKNOWN, continuing_subword_prefix=CONTINUATION)
    )
    tokenizer.normalizer = normalizers.Sequence(  # pyright: ignore[reportAttributeAccessIssue]
        [normalizers.NFD(), normalizers.StripAccents()]
    )
    tokenizer.pre_tokenizer = splitter  # pyright: ignore[reportAttributeAccessIssue]
    # as Llama's tokenizer does: patches are put behind the first token
    tokenizer.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
        single=f"{BOS} $A", special_tokens=[(BOS, ids[BOS])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=UNKNOWN,
        bos_token=BOS,
        eos_token=STOP,
        pad_token=PAD,
        padding_side="right",
    )


def build_tiny_policy(
    instructions: Sequence[str],
    statistics: ActionStatistics,
    *,
    sizes: TinySizes = TinySizes(),
    seed: int = 0,
    proprio_stats: NormalizationStats | None = None,
) -> OpenVLAOFTPolicy:
    """Build an untrained policy for the given tasks.

    Args:
        instructions: instructions of the tasks, whose words get pieces of the tokenizer.
        statistics: statistics of the actions that it is to be trained on.
        sizes: sizes of the model.
        seed: seed of the weights; the process's random state is not changed.
        proprio_stats: statistics of proprio; needed if ``sizes.proprio_dim`` is not 0.
    """
    tokenizer = build_tokenizer(instructions)
    config = tiny_config(tokenizer, sizes)
    # saved with the folder, whose reader takes the columns of this normalization
    config.action_proprio_normalization_type = statistics.normalization
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = OpenVLAOFTModel(config)
    # one tower is SigLIP's kind, two are DINOv2 and SigLIP
    image_statistics = [DINO_STATISTICS, SIGLIP_STATISTICS][-len(config.towers) :]
    processor = OpenVLAOFTProcessor(
        config, tokenizer, image_statistics, statistics, sizes.render_size, proprio_stats
    )
    return OpenVLAOFTPolicy(model, processor)


def _plain_tower(sizes: TinySizes) -> VisionTower:
    return VisionTower(
        patch_size=sizes.patch_size,
        hidden_size=sizes.vision_width,
        depth=sizes.vision_depth + 1,
        heads=sizes.vision_heads,
        mlp_size=4 * sizes.vision_width,
        class_token=False,
        registers=0,
        layer_scale=False,
        attention_pool=False,
    )


def _fused_towers(sizes: TinySizes) -> list[VisionTower]:
    plain = _plain_tower(sizes)
    first = replace(plain, class_token=True, registers=4, layer_scale=True)
    return [first, replace(plain, attention_pool=True)]
