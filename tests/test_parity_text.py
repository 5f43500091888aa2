"""Tokenizer and text rules on the recorded strings.

Where the reference fails or distorts a text, `corrected` says what is right instead, and why.
"""

import re
from functools import cache
from typing import Any

import inflect
import pytest
from parity import table

import whisper.tokenizer
from cosyvoice.cli.text_normalizer import TextNormalizer
from cosyvoice.tokenizer.tokenizer import get_tokenizer
from cosyvoice.utils import frontend_utils
