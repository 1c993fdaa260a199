"""The tokenizer of an exported policy, as other programs load it: by ``AutoTokenizer``.

transformers 5 builds the pipeline of some of Llama's tokenizers anew, and then drops spaces
(veRL issue 6080). What we write must give the ids of the file that came with the weights.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from verl_vla.policies.normalization import ActionStatistics
from verl_vla.policies.openvla_oft import OpenVLAOFTModel, OpenVLAOFTPolicy, OpenVLAOFTProcessor
from verl_vla.policies.openvla_oft.tiny import (
    BOS,
    PAD,
    SPECIAL_PIECES,
    STOP,
    UNKNOWN,
    TinySizes,
    tiny_config,
)
from verl_vla.policies.preprocessing import EMPTY_PIECE, PROMPT, SIGLIP_STATISTICS
from verl_vla.policies.registry import load_policy, load_processor

SIZES = TinySizes(image_size=28, vision_width=12, llm_width=16, llm_depth=1, llm_mlp=16)
WORDS = ("lift", "the", "red", "cube", "action", "should", "robot", "to", "take")
TEXTS = (
    PROMPT.format(instruction="lift the red cube"),
    "  lift   the cube ",
    "\n lift\nthe cube\n",
    "",
    " ",
    "liftthe",
    "lift é \N{GRINNING FACE}",
    f"lift {STOP} the {PAD}cube",
)


def llama_tokenizer(pipeline: str) -> Tokenizer:
    """Llama's byte-pair encoding in small: boundaries of words are pieces, bytes spell the rest."""
    spelling = [EMPTY_PIECE, *sorted({*"abcdefghijklmnopqrstuvwxyzIWO:?.,"})]
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    pieces = list(dict.fromkeys([*SPECIAL_PIECES, *bytes_, *spelling]))
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        begun = EMPTY_PIECE
        for letter in word:
            if (begun, letter) not in merges:
                merges.append((begun, letter))
            begun += letter
            pieces.append(begun)
    ids = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer: Any = Tokenizer(
        models.BPE(ids, merges, unk_token=UNKNOWN, byte_fallback=True, fuse_unk=True)
    )
    if pipeline == "normalizer":
        # as in tokenizer.json of openvla-7b
        steps = [normalizers.Prepend(EMPTY_PIECE), normalizers.Replace(" ", EMPTY_PIECE)]
        tokenizer.normalizer = normalizers.Sequence(steps)
    else:
        # as transformers writes it now, for legacy=False
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, ids[BOS])]
    )
    tokenizer.add_special_tokens(
        [AddedToken(piece, normalized=False) for piece in (UNKNOWN, BOS, STOP, PAD)]
    )
    return tokenizer


def published_folder(folder: Path, tokenizer: Tokenizer, kind: str) -> Path:
    """A policy's folder whose tokenizer_config.json is that of openvla-7b, with a class."""
    named = {"unk_token": UNKNOWN, "bos_token": BOS, "eos_token": STOP, "pad_token": PAD}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side="right", **named)
    config = tiny_config(fast, SIZES)
    torch.manual_seed(0)
    mask = np.array([True] * 6 + [False])
    statistics = ActionStatistics(q01=-np.ones(7), q99=np.ones(7), mask=mask, key="mini")
    processor = OpenVLAOFTProcessor(config, fast, [SIGLIP_STATISTICS], statistics)
    OpenVLAOFTPolicy(OpenVLAOFTModel(config), processor).save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    published = {
        "tokenizer_class": kind,
        "processor_class": "PrismaticProcessor",
        "legacy": False,
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "padding_side": "right",
        "sp_model_kwargs": {},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(published | named))
    return folder


@pytest.mark.parametrize("kind", ["LlamaTokenizer", "LlamaTokenizerFast", "TokenizersBackend"])
@pytest.mark.parametrize("pipeline", ["normalizer", "pre-tokenizer"])
def test_auto_tokenizer_gives_the_ids_of_the_published_file(
    tmp_path: Path, pipeline: str, kind: str
) -> None:
    tokenizer = llama_tokenizer(pipeline)
    folder = published_folder(tmp_path / "published", tokenizer, kind)
    exported = tmp_path / "exported"
    load_policy(folder).save_pretrained(exported)
    again: Any = AutoTokenizer.from_pretrained(str(exported), local_files_only=True)
    loaded: Any = load_processor(exported)
    for text in TEXTS:
        ids = tokenizer.encode(text).ids
        assert again.encode(text) == ids, text
        assert loaded.tokenizer.encode(text) == ids, text
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id"):
        assert again.__getattr__(name) == loaded.tokenizer.__getattr__(name)
    assert loaded.prompt("lift the red cube").tolist() == [
        *again.encode(TEXTS[0]),
        SPECIAL_PIECES.index(EMPTY_PIECE),
    ]
