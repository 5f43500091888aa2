#!/usr/bin/env python3
"""Writes the configuration of fine-tuning, and prints the name of the model folder's speech tokenizer.

    python local/make_config.py --model_dir CosyVoice2-0.5B --settings conf/train.yaml --output exp/anna/config.yaml

The configuration is the model folder's, with the settings in place of its own entries. What the folder does not have,
since it is for speaking only, comes from the recipe of its generation in examples/libritts.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cosyvoice.model_folder.folder import ModelFolder

ROOT = Path(__file__).resolve().parents[3]
ENTRY = re.compile(r"^(?=[A-Za-z_]\w*:)", re.MULTILINE)
FILE = re.compile(r"!file (\S+)")
# Clips come without the places of their tokens in the text; the language model finds these itself.
PLACES = re.compile(r"^ *!ref <read_places>,\n", re.MULTILINE)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_dir", type=Path, required=True, help="model folder")
    parser.add_argument("--settings", type=Path, required=True, help="YAML whose entries count instead of the folder's")
    parser.add_argument("--output", type=Path, required=True, help="file to write")
    options = parser.parse_args(argv)

    from cosyvoice.model_folder.folder import ModelFolder
    from cosyvoice.utils.file_utils import atomic_write, copy_file

    folder = ModelFolder(options.model_dir)
    text = compose(folder, options.settings)
    for name in FILE.findall(text):
        copy_file(folder.path / name, options.output.parent / name)
    with atomic_write(options.output) as temporary:
        temporary.write_text(text, encoding="utf-8")
    print(folder.speech_tokenizer.name)


def compose(folder: "ModelFolder", settings: Path) -> str:
    """Return the configuration. Raises InputError where a file cannot be read."""
    recipe = ROOT / "examples" / "libritts" / folder.yaml.stem / "conf" / folder.yaml.name
    entries = read_entries(recipe) | read_entries(folder.yaml) | read_entries(settings)
    if folder.text_model:
        entries["qwen_pretrain_path"] = f"qwen_pretrain_path: '{folder.text_model.resolve()}'\n"
    return PLACES.sub("", "".join(entries.values()))


def read_entries(path: Path) -> dict[str, str]:
    """Return the text of each top-level entry of a YAML file, by its name."""
    from cosyvoice.runtime.errors import InputError
    from cosyvoice.utils.text_files import decode_lines

    if not path.is_file():
        raise InputError(f"{path} does not exist; give a folder of CosyVoice2 or CosyVoice-300M, and settings in YAML")
    _, *entries = ENTRY.split("\n".join([*decode_lines(path.read_bytes(), str(path)), ""]))
    return {entry.partition(":")[0]: entry for entry in entries}


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    from cosyvoice.runtime.command import run

    run(main)
