"""Our 300M configuration has the state dict of CosyVoice-300M: same names, shapes and dtypes."""

import re
from pathlib import Path

import pytest
import torch
from models import tiny
from parity import PARITY_DIR, table
from torch import Tensor

from cosyvoice.model_folder.model_yaml import load_model_yaml
from cosyvoice.model_folder.weights import load_strict, read_state_dict

CONFIG = Path(__file__).parents[1] / "examples" / "libritts" / "cosyvoice" / "conf" / "cosyvoice.yaml"
PARTS = ("llm", "flow", "hift")


@pytest.mark.parametrize("part", PARTS)
def test_full_size_state_dict_is_that_of_the_manifest(part: str) -> None:
    with torch.device("meta"):  # shapes without memory
        module = load_model_yaml(CONFIG, parts=(part,))[part]
    expected = table("manifest_cosyvoice_300m")[part]
    state = module.state_dict()
    found = {
        name: {"shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch.")}
        for name, tensor in state.items()
    }
    assert found == expected["keys"]
    assert sum(parameter.numel() for parameter in module.parameters()) == expected["num_parameters"]


@pytest.mark.parametrize("part", PARTS)
def test_recorded_weights_load_strictly(part: str) -> None:
    recorded = read_state_dict(PARITY_DIR / f"tiny_{part}.pt")
    loaded = tiny(part).state_dict()
    assert loaded.keys() == recorded.keys()
    assert all(torch.equal(loaded[name], recorded[name]) for name in recorded)


def respelled(path: Path) -> dict[str, Tensor]:
    """The vocoder's weights under their older names."""
    older = {"parametrizations.weight.original0": "weight_g", "parametrizations.weight.original1": "weight_v"}
    pattern = re.compile("|".join(older))
    return {
        f"generator.{pattern.sub(lambda found: older[found[0]], name)}": tensor
        for name, tensor in read_state_dict(path).items()
    }


LEGACY = [*PARITY_DIR.glob("tiny_hift_legacy.pt"), None]  # None: the new file, its names respelled


@pytest.mark.parametrize("path", LEGACY)
def test_older_vocoder_names_load_the_same_weights(path: Path | None) -> None:
    vocoder = tiny("hift")
    expected = {name: tensor.clone() for name, tensor in vocoder.state_dict().items()}
    for parameter in vocoder.parameters():
        torch.nn.init.zeros_(parameter)
    load_strict(vocoder, read_state_dict(path) if path else respelled(PARITY_DIR / "tiny_hift.pt"), "hift.pt")
    loaded = vocoder.state_dict()
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)
