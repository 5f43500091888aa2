"""Small models with recorded weights."""

from parity import PARITY_DIR
from torch import nn

from cosyvoice.utils.checkpoint import load_strict, read_state_dict
from cosyvoice.utils.model_yaml import load_model_yaml


def tiny(part: str) -> nn.Module:
    """A fresh `llm`, `flow` or `hift` of tiny.yaml's sizes with tiny_<part>.pt loaded, in eval mode."""
    module = load_model_yaml(PARITY_DIR / "tiny.yaml", parts=(part,))[part]
    weights = PARITY_DIR / f"tiny_{part}.pt"
    load_strict(module, read_state_dict(weights), weights.name)
    return module.eval()
