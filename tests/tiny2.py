"""CosyVoice2's recorded configuration without the parts that other tests build, and its small vocoder."""

import re
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

from parity import V2
from torch import nn

from cosyvoice.model_folder.model_yaml import load_model_yaml
from cosyvoice.model_folder.weights import load_strict, read_state_dict

NOT_NEEDED = ("llm", "flow", "get_tokenizer")
TOKENIZER = (
    "get_tokenizer: !name:cosyvoice.tokenizer.tokenizer.get_byte_tokenizer\n"  # the tests put theirs in its place
)


def write_config(folder: Path) -> Path:
    """Write tiny2.yaml with another tokenizer, and without language model and flow. Return its path."""
    text = (V2.folder / "tiny2.yaml").read_text(encoding="utf-8")
    for entry in NOT_NEEDED:
        text, count = re.subn(rf"(?m)^{entry}: .*\n(?:[ \t].*\n|\n)+", "", text)
        assert count == 1, entry
    path = folder / "cosyvoice2.yaml"
    path.write_text(TOKENIZER + text, encoding="utf-8")
    return path


def tiny_hift() -> nn.Module:
    """Return a fresh small vocoder with the recorded weights, in eval mode."""
    with TemporaryDirectory() as folder:
        hift = load_model_yaml(write_config(Path(folder)), parts=("hift",))["hift"]
    load_strict(hift, read_state_dict(V2.folder / "tiny2_hift.pt"), "tiny2_hift.pt")
    return hift.eval()


def tiny2_model_dir(folder: Path) -> Path:
    """Make `folder` a model folder of the recorded tiny model and return it."""
    shutil.copyfile(V2.folder / "tiny2.yaml", folder / "cosyvoice2.yaml")
    shutil.copyfile(V2.folder / "tiny2_speech_tokenizer.onnx", folder / "speech_tokenizer_v2.onnx")
    for name in ("llm.pt", "flow.pt", "hift.pt", "campplus.onnx", "spk2info.pt"):
        shutil.copyfile(V2.folder / f"tiny2_{name}", folder / name)
    shutil.copytree(V2.folder / "tiny2_blanken", folder / "CosyVoice-BlankEN", copy_function=shutil.copyfile)
    return folder
