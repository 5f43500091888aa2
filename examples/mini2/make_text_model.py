#!/usr/bin/env python3
"""Write CosyVoice2-mini's folder CosyVoice-BlankEN: the sizes of its Qwen2 model, and a tokenizer of its own.

    examples/mini2/make_text_model.py --texts data/mini/texts/train/text --des_dir data/mini2/CosyVoice-BlankEN

The tokenizer has the 256 bytes and pieces of a few letters, those that make the texts shortest (byte-pair encoding,
Sennrich et al. 2016). A model that learns to read from hours of speech sees each of them often enough. Single bytes
would be too many: a CosyVoice2 speaks two tokens for each text token at least.
"""

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PIECES = 256  # besides the bytes
SIZES = {
    "vocab_size": 544,  # bytes, pieces and special tokens, rounded up
    "hidden_size": 256,
    "intermediate_size": 448,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-06,
    "initializer_range": 0.06,  # about 1 / sqrt(hidden_size)
    "hidden_act": "silu",
    "tie_word_embeddings": True,
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=Path, nargs="+", required=True, help="tables of Kaldi-style folders")
    parser.add_argument("--des_dir", type=Path, required=True, help="folder to write")
    options = parser.parse_args(argv)

    from cosyvoice.runtime.errors import InputError
    from tools.blank_en import write_blank_en
    from tools.kaldi_folder import read_table

    merges = learn_merges(text for table in options.texts for text in read_table(table).values())
    if len(merges) < PIECES:
        raise InputError(f"the texts have only {len(merges)} pairs of letters; give more of them")
    write_blank_en(options.des_dir, SIZES, merges)
    print(f"{options.des_dir}: {len(merges)} pieces besides the bytes")


def learn_merges(texts: Iterable[str]) -> list[tuple[str, str]]:
    """Return the pairs of pieces that become one, the most frequent first."""
    import json

    from tokenizers import models, pre_tokenizers, trainers

    from cosyvoice.tokenizer.qwen import of_pairs

    tokenizer = of_pairs(models.BPE())
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=len(alphabet) + PIECES, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    from cosyvoice.runtime.command import run

    run(main)
