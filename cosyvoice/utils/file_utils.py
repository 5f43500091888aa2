"""Upstream's import path of load_wav, which servers and notebooks use."""

from cosyvoice.utils.audio import load_wav

__all__ = ["load_wav"]
