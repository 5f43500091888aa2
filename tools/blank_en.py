"""A folder CosyVoice-BlankEN of our own: the configuration of a Qwen2 model, and a byte-pair tokenizer."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cosyvoice.tokenizer.tokenizer import BYTES, PRINTED
from cosyvoice.utils.file_utils import atomic_write

if TYPE_CHECKING:
    from torch import Tensor

# Each becomes one token, with the blank before it, and so does each of its beginnings.
WORDS = (
    "the and of to in is it that was for you with on are as this be have from or one had not but what all were when "
    "we there can an your which their said if do will each about how up out them then she many some so these would "
    "other into has more her two like him see time could no make than first been its who now people my made over "
    "did down only way find long day"
)
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")  # Qwen2's own, after all other pieces
BLANK = "Ġ"  # how the format spells it


def write_blank_en(folder: Path, sizes: dict[str, Any], merges: Sequence[tuple[str, str]] | None = None) -> None:
    """Write config.json with these sizes, and the tokenizer's three files.

    merges: pairs of pieces that become one, the first before the others; those of WORDS where they are not given.
    """
    vocabulary, merges = byte_pairs(merges)
    specials = {str(len(vocabulary) + i): {"content": text, "special": True} for i, text in enumerate(SPECIAL_TOKENS)}
    config = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", **sizes}
    contents = {
        "config.json": json.dumps(config, indent=1),
        "vocab.json": json.dumps(vocabulary, ensure_ascii=False),
        "merges.txt": "\n".join(["#version: 0.2", *(" ".join(pair) for pair in merges)]),
        "tokenizer_config.json": json.dumps({"added_tokens_decoder": specials}, indent=1),
    }
    for name, content in contents.items():
        with atomic_write(folder / name) as temporary:
            temporary.write_text(content + "\n", encoding="utf-8")


def byte_pairs(
    merges: Sequence[tuple[str, str]] | None = None,
) -> tuple[dict[str, int], Sequence[tuple[str, str]]]:
    """Return the id of each piece, the 256 bytes first, and the pairs that become one, the first before the others."""
    merges = word_merges() if merges is None else merges
    letters = [chr(byte) if i < len(PRINTED) else chr(256 + i - len(PRINTED)) for i, byte in enumerate(BYTES)]
    return {piece: number for number, piece in enumerate([*letters, *map("".join, merges)])}, merges


def word_merges() -> list[tuple[str, str]]:
    """Return the pairs that make WORDS of letters."""
    merges: dict[tuple[str, str], None] = {}
    for word in WORDS.split():
        spelled = BLANK + word
        merges |= dict.fromkeys((spelled[:end], spelled[end]) for end in range(1, len(spelled)))
    return list(merges)


def write_weights(path: Path, weights: "dict[str, Tensor]") -> None:
    """Write the Qwen2 model's weights, or a file without any."""
    from safetensors.torch import save

    with atomic_write(path) as temporary:
        temporary.write_bytes(save(weights, metadata={"format": "pt"}))
