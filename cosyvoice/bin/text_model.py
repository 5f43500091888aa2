"""The weights of the text model that CosyVoice2's language model is first trained from."""

import sys
from pathlib import Path

from torch import nn

from cosyvoice.model_folder.blank_en import REMEDY, WEIGHTS
from cosyvoice.model_folder.weights import check_finite, load_strict
from cosyvoice.runtime.errors import InputError

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def start_from_text_model(llm: nn.Module, folder: Path) -> None:
    """Give the llm's text model the weights of the folder's `model.safetensors`, if it has that file.

    Without the file the text model keeps its random weights, and a line on stderr says so. Raises InputError for a
    damaged file, and for one of another size.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = folder / WEIGHTS
    if not path.is_file():
        print(f"{folder} has no {path.name}: the text model starts from random weights", file=sys.stderr)
        return
    try:
        state = {name: tensor.float() for name, tensor in load_file(path).items()}
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} cannot be read: {error}; {REMEDY}") from None
    check_finite(path, state)
    if EMBEDDING in state:
        state.setdefault(HEAD, state[EMBEDDING])  # one tensor, which files hold once
    load_strict(llm.llm.model, state, str(path))
