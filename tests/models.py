"""Small models with recorded weights."""

import shutil
from pathlib import Path

from parity import PARITY_DIR, V2
from torch import nn

from cosyvoice.model_folder.model_yaml import load_model_yaml
from cosyvoice.model_folder.weights import load_strict, read_state_dict
from voices.run_state import Origin

ORIGIN = Origin("joint", run="", base={}, data="", speaker="")  # of a model that writes no checkpoint


def tiny(part: str) -> nn.Module:
    """A fresh `llm`, `flow` or `hift` of tiny.yaml's sizes with tiny_<part>.pt loaded, in eval mode."""
    return built(PARITY_DIR / "tiny.yaml", part)


def tiny2(part: str) -> nn.Module:
    """The same of CosyVoice2's tiny2.yaml."""
    return built(V2.folder / "tiny2.yaml", part, {"qwen_pretrain_path": str(V2.folder / "tiny2_blanken")})


def built(config: Path, part: str, overrides: dict[str, str] | None = None) -> nn.Module:
    module = load_model_yaml(config, parts=(part,), overrides=overrides)[part]
    weights = config.with_name(f"{config.stem}_{part}.pt")
    load_strict(module, read_state_dict(weights), weights.name)
    return module.eval()


def tiny_model_dir(folder: Path) -> Path:
    """Makes `folder` a model folder of these weights, without the .onnx files."""
    shutil.copy(PARITY_DIR / "tiny.yaml", folder / "cosyvoice.yaml")
    for part in ("llm", "flow", "hift"):
        shutil.copy(PARITY_DIR / f"tiny_{part}.pt", folder / f"{part}.pt")
    return folder
