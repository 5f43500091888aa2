#!/usr/bin/env python3
"""Write the folder of a small model from the results of its recipe.

    examples/mini/make_model_dir.py --recipe examples/mini --work_dir data/mini --voices kumo --model_dir output/mini

Weights are stored in half precision. SHA256SUMS lists the files for `sha256sum --check`.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from cosyvoice.model_folder.folder import ModelFolder

ROOT = Path(__file__).resolve().parents[2]
WEIGHTS = {"llm.pt": "exp/llm/llm.pt", "flow.pt": "exp/flow/flow.pt", "hift.pt": "exp/hifigan/hift.pt"}
LEXICON = "lexicon.txt.gz"  # of a model without a text model


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", type=Path, required=True, help="folder of the model's YAML and card")
    parser.add_argument("--work_dir", type=Path, required=True, help="folder of the recipe's results")
    parser.add_argument("--voices", nargs="+", required=True, help="speakers to store as base voices")
    parser.add_argument("--model_dir", type=Path, required=True, help="folder to write")
    options = parser.parse_args(argv)

    from cosyvoice.model_folder.blank_en import WEIGHTS as TEXT_WEIGHTS
    from cosyvoice.model_folder.fingerprints import fingerprint_file
    from cosyvoice.model_folder.folder import ModelFolder
    from cosyvoice.model_folder.weights import read_state_dict
    from cosyvoice.runtime.errors import InputError
    from cosyvoice.utils.file_utils import atomic_write, copy_file, save_tensors
    from tools.blank_en import write_weights

    results, folder, recipe = options.work_dir, options.model_dir, ModelFolder(options.recipe)
    copied = [recipe.speaker_encoder.name, recipe.speech_tokenizer.name, *text_files(recipe)]
    sources = [results / source for source in (*WEIGHTS.values(), *copied)]
    if missing := [source for source in sources if not source.is_file()]:
        raise InputError(f"{missing[0]} does not exist. Run the stages of {recipe.path}/run.sh before this one")
    voices = read_voices(results / "voices" / "train", options.voices)
    for name, source in WEIGHTS.items():
        save_tensors(halved(read_state_dict(results / source)), folder / name)
    save_tensors(voices, folder / "spk2info.pt")
    copies = {name: results / name for name in copied}
    copies |= {recipe.yaml.name: recipe.yaml, "README.md": recipe.path / "model_card.md"}
    for name, source in copies.items():
        copy_file(source, folder / name)
    names = [*WEIGHTS, *copies, "spk2info.pt"]
    if recipe.text_model:
        # the public CosyVoice2 wants this file beside config.json, and reads llm.pt over it
        names.append(f"{recipe.text_model.name}/{TEXT_WEIGHTS}")
        write_weights(folder / names[-1], {})
    names.sort()
    with atomic_write(folder / "SHA256SUMS") as temporary:
        temporary.write_text("".join(f"{fingerprint_file(folder / name)}  {name}\n" for name in names))
    size = sum((folder / name).stat().st_size for name in names)
    print(f"{folder}: {size / 1e6:.1f} MB, voices {', '.join(voices)}")


def halved(state: "dict[str, Tensor]") -> "dict[str, Tensor]":
    """Return the weights in half precision. Equal ones, as of an embedding and its head, become one, stored once."""
    halves = {name: value.half() for name, value in state.items()}
    once: dict[tuple, Tensor] = {}
    return {name: once.setdefault((half.shape, half.numpy().tobytes()), half) for name, half in halves.items()}


def text_files(recipe: "ModelFolder") -> list[str]:
    """Return the names of what turns text into units."""
    from cosyvoice.model_folder.folder import TOKENIZER_FILES

    if not recipe.text_model:
        return [LEXICON]
    return [f"{recipe.text_model.name}/{file}" for file in ("config.json", *TOKENIZER_FILES)]


def read_voices(corpus: Path, names: Sequence[str]) -> dict:
    """Return {speaker: {"embedding": (1, 192)}}, the mean vectors of speakers' recordings, as spk2info.pt has them."""
    import torch

    from cosyvoice.runtime.errors import InputError
    from tools.kaldi_folder import read_numbers

    vectors = read_numbers(corpus / "spk2embedding.pt")
    if unknown := [name for name in names if name not in vectors]:
        raise InputError(f"{corpus / 'spk2embedding.pt'} has no speaker {unknown[0]}. It has {', '.join(vectors)}")
    return {name: {"embedding": torch.tensor([vectors[name]], dtype=torch.float32)} for name in names}


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    from cosyvoice.runtime.command import run

    run(main)
