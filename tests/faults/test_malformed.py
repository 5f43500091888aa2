"""Files that are almost right: whatever lies in them, reading them works or ends in one line that names the file.

`make test` reads a few of each family, `make test-faults` many: FAULT_CASES says how many.
"""

import copy
import io
import json
import math
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
import torch
from models import tiny_model_dir
from parity import PARITY_DIR

from clips.recordings import find_recordings
from config import JOINT_TRAINING_CONFIG, MODES
from cosyvoice.cli.frontend import read_spk2info
from cosyvoice.model_folder.folder import ModelFolder
from cosyvoice.model_folder.model_yaml import load_model_yaml
from cosyvoice.model_folder.weights import load_strict, read_state_dict
from cosyvoice.runtime.errors import InputError
from cosyvoice.tokenizer.phones import read_lexicon
from cosyvoice.utils.audio import read_wav
from cosyvoice.utils.frames import Rates
from dataset import COLUMNS, SCHEMA, check_row, collate, read_rows, to_clip
from tools.kaldi_folder import read_numbers, read_table
from tools.make_parquet_list import schema
from voices.choice import choose_voice, read_vector
from voices.run import base_fingerprints, read_run

CASES = int(os.environ.get("FAULT_CASES", "25"))
POISONS = [
    None, True, -1, 0, 7, 2**40, -(2**63), 0.5, 1e300, math.nan, math.inf, "", "text", "\0", "../../x", b"bytes", [],
    {}, [None], [[1], [2]], {"a": 1}, {1: "a"}, torch.zeros(3), torch.full((1, 192), torch.nan), torch.ones(2, 2) > 0,
]  # fmt: skip
YAML_POISONS = [
    "null", "true", "-1", "0", "100000", "1000000000000", "0.5", "-.inf", ".nan", "text", "[]", "[1, a]", "{}", "''",
    "!ref <sample_rate>", "!ref <nothing>", "!ref <sample_rate> ** 9", "!new:torch.nn.Linear [1]", "!!int x", "*a",
]  # fmt: skip
JSON_POISONS = [value for value in POISONS if not isinstance(value, bytes | torch.Tensor)]


def spoilt(content: Any, draw: random.Random, poisons: list[Any]) -> Any:
    """Return a copy in which one thing, somewhere, is replaced, missing, doubled or under another name."""
    content = copy.deepcopy(content)
    inside = content
    while True:
        keys = list(inside) if isinstance(inside, dict) else list(range(len(inside)))
        if not keys:
            return draw.choice(poisons)
        key = draw.choice(keys)
        if isinstance(inside[key], dict | list) and inside[key] and draw.random() < 0.7:
            inside = inside[key]
            continue
        deed = draw.choice(("replace", "replace", "remove", "rename"))
        if deed == "replace":
            inside[key] = draw.choice(poisons)
        elif deed == "remove":
            del inside[key]
        elif isinstance(inside, dict):
            inside[draw.choice(["another", 7, ""])] = inside.pop(key)
        else:
            inside.append(inside[key])
        return content


def with_other_bytes(content: bytes, draw: random.Random, most_place: int | None = None) -> bytes:
    """Return the content with some bytes changed, cut off, or put in."""
    changed = bytearray(content)
    places = len(changed) if most_place is None else min(most_place, len(changed))
    for _ in range(draw.choice((1, 1, 2, 8))):
        place, deed = draw.randrange(places), draw.choice(("set", "set", "flip", "cut", "insert"))
        if deed == "set":
            changed[place : place + 4] = draw.choice((b"\xff" * 4, bytes(4), b"\x7f\xff\xff\xff", draw.randbytes(4)))
        elif deed == "flip":
            changed[place] ^= 1 << draw.randrange(8)
        elif deed == "insert":
            changed[place:place] = draw.randbytes(draw.randrange(1, 9))
        else:
            del changed[draw.randrange(1, len(changed)) :]
            return bytes(changed)
    return bytes(changed)


class Good:
    """One good file of each kind."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = folder / "model"
        self.model.mkdir()
        tiny_model_dir(self.model)
        self.output = folder / "output"
        self.output.mkdir()
        draw = np.random.default_rng(0)
        vector = torch.from_numpy(draw.normal(size=192).astype(np.float32))
        tokens = torch.arange(9, dtype=torch.int32)[None]
        prompt = {name: tokens for name in ("prompt_text", "llm_prompt_speech_token", "flow_prompt_speech_token")}
        vectors = {name: vector[None] for name in ("embedding", "llm_embedding", "flow_embedding")}
        self.speakers = {"anna": {"embedding": vector[None]}, "ben": vectors | prompt}
        self.speakers["ben"]["prompt_speech_feat"] = torch.zeros(1, 15, 80)
        self.base = base_fingerprints(ModelFolder(self.model))
        self.sidecar = {
            "version": "0.1.0", "mode": "joint", "speaker": "anna", "run": "1", "base": self.base,
            "files": {"llm": "llm.pt", "flow": "flow.pt"}, "merged_epoch": {"llm": 1, "flow": 1}, "pace": 4.5,
        }  # fmt: skip
        for part in ("llm", "flow"):
            os.link(self.model / f"{part}.pt", self.output / f"{part}.pt")
        progress = {
            "best_loss": 1.0, "best_epoch": 1, "stopped": "", "history": [{"epoch": 1, "train": 1.0}],
            "best": {"a.lora_A": torch.zeros(2, 2)},
        }  # fmt: skip
        state = {
            "mode": "flow_only", "config": JOINT_TRAINING_CONFIG, "seed": 1, "speaker": "anna", "run": "1", "data": "",
            "base": self.base, "embedding": vector, "epochs": 1, "batches_done": 0, "pace": 4.5,
            "progress": {"flow": progress},
        }  # fmt: skip
        self.checkpoint = {"voice": state, "state_dict": {"parts.flow.a.lora_A": torch.zeros(2, 2)}}
        frames = 17
        self.row = {
            "utt": "001", "wav": "001.wav", "audio_data": b"RIFF", "text": "Hello.", "spk": "anna",
            "utt_embedding": vector.tolist(), "spk_embedding": vector.tolist(), "speech_token": list(range(10)),
            "text_token": [1, 2, 3], "speech_feat": [0.0] * (80 * frames), "speech_feat_shape": [frames, 80],
            "seconds": 0.2, "peak_dbfs": -3.0, "silence_share": 0.0, "content_hash": "0", "encoders": "0",
        }  # fmt: skip
        self.yaml = (PARITY_DIR / "tiny.yaml").read_text(encoding="utf-8")
        wav = io.BytesIO()
        soundfile.write(wav, 0.1 * draw.normal(size=4000), 16000, format="WAV")
        self.wav = wav.getvalue()

    def write(self, name: str, content: bytes | str) -> Path:
        path = self.folder / name
        path.write_bytes(content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content)
        return path


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Good:
    return Good(tmp_path_factory.mktemp("faults"))


def save(content: Any, path: Path) -> Path:
    torch.save(content, path)
    return path


# Families: write a file that is almost right, and read it as the commands do


def sidecar(good: Good, draw: random.Random) -> None:
    text = json.dumps(spoilt(good.sidecar, draw, JSON_POISONS))
    path = good.output / "voice_joint.json"
    path.write_bytes(with_other_bytes(text.encode(), draw) if draw.random() < 0.3 else text.encode())
    choose_voice({}, None, good.output, ModelFolder(good.model))
    choose_voice({"flow": good.output / "flow.pt"}, None, good.output, ModelFolder(good.model))


def speakers(good: Good, draw: random.Random) -> None:
    path = save(spoilt(good.speakers, draw, POISONS), good.folder / "spk2info.pt")
    for voice in read_spk2info(path).values():
        for name in ("embedding", "llm_embedding", "flow_embedding"):
            if name in voice:
                torch.nn.functional.normalize(voice[name], dim=1)


def checkpoint(good: Good, draw: random.Random) -> None:
    run = read_run(save(spoilt(good.checkpoint, draw, POISONS), good.folder / "joint_flow_only_last.ckpt"))
    run.check_base(ModelFolder(good.model))
    run.best("flow")
    run.scale("flow")


def rows(good: Good, draw: random.Random) -> None:
    row = dict(good.row)
    name = draw.choice([name for name in COLUMNS if name != "encoders"])
    kind = SCHEMA.field(name).type
    if name in ("utt", "spk"):
        row[name] = draw.choice([None, "", " "])
    else:
        values = list(row[name])
        others = [math.nan, 1e38] if pa.types.is_floating(kind.value_type) else [2**31 - 1]
        values[draw.randrange(len(values))] = draw.choice([None, -1, 0, *others])
        fixed = pa.types.is_fixed_size_list(kind)
        row[name] = draw.choice([None, values, values if fixed else [], values if fixed else values[:-1]])
    path = good.folder / "clips-00000.parquet"
    if draw.random() < 0.2:
        row["utt_embedding"] = draw.choice([[math.nan] * 192, [0.0] * 192])
    pq.write_table(pa.Table.from_pylist([row], SCHEMA), path)
    if draw.random() < 0.3:
        path.write_bytes(with_other_bytes(path.read_bytes(), draw))
    for read in read_rows(path):
        check_row(path, read)
        collate([to_clip(read, Rates(22050, 256, 50))])


def recipe_rows(good: Good, draw: random.Random) -> None:
    """Rows of the recipe's files go through the steps of its configuration; damaged ones are left out."""
    row = {name: good.row[name] for name in ("utt", "wav", "text", "spk", "speech_token")} | {"audio_data": good.wav}
    row |= {name: good.row["utt_embedding"] for name in ("utt_embedding", "spk_embedding")}
    spoilt_row = dict(row)
    name = draw.choice(list(row))
    if isinstance(row[name], list):
        values = list(row[name])
        others = [math.nan, math.inf] if isinstance(values[0], float) else [-1]
        values[draw.randrange(len(values))] = draw.choice([None, *others])
        spoilt_row[name] = draw.choice([None, values, values[:-1]])
    else:
        spoilt_row[name] = None
    path = good.folder / "parquet_000000000.tar"
    pq.write_table(pa.Table.from_pylist([spoilt_row, row, row], schema("0")), path)
    if draw.random() < 0.4:
        path.write_bytes(with_other_bytes(path.read_bytes(), draw))
    config = load_model_yaml(PARITY_DIR / "tiny.yaml", parts=("data_pipeline",))
    samples = iter([{"src": str(path)}])
    for step in config["data_pipeline"]:
        samples = step(samples, mode="train")
    for padded in samples:
        assert len(padded["utts"]) >= 2


def model_yaml(good: Good, draw: random.Random) -> None:
    lines = good.yaml.splitlines()
    valued = [number for number, line in enumerate(lines) if ": " in line and not line.lstrip().startswith(("#", "__"))]
    number = draw.choice(valued)
    before, _, _ = lines[number].partition(": ")
    lines[number] = f"{before}: {draw.choice(YAML_POISONS)}"
    path = good.write("cosyvoice.yaml", "\n".join(lines))
    parts = load_model_yaml(path, parts=("llm", "flow", "hift", "sample_rate", "allowed_special", "get_tokenizer"))
    for part in ("llm", "flow", "hift"):
        load_strict(parts[part], read_state_dict(good.model / f"{part}.pt"), part)


def weights(good: Good, draw: random.Random) -> None:
    state = spoilt(torch.load(good.model / "hift.pt", weights_only=True), draw, POISONS)
    model = load_model_yaml(PARITY_DIR / "tiny.yaml", parts=("hift",))["hift"]
    load_strict(model, read_state_dict(save(state, good.folder / "hift.pt")), "hift.pt")


def weights_bytes(good: Good, draw: random.Random) -> None:
    read_state_dict(good.write("llm.pt", with_other_bytes((good.model / "hift.pt").read_bytes(), draw)))


def vector(good: Good, draw: random.Random) -> None:
    content = io.BytesIO()
    kind = draw.choice(["f4", "f8", "f2", "i4", "c8", "?", "U5", "M8[s]"])
    np.save(content, np.ones(draw.choice([192, 191, 0]), dtype=kind))
    read_vector(good.write("vector.npy", with_other_bytes(content.getvalue(), draw, 128)))


def vector_pt(good: Good, draw: random.Random) -> None:
    read_vector(save(draw.choice([*POISONS, good.speakers]), good.folder / "vector.pt"))


def audio(good: Good, draw: random.Random) -> None:
    read_wav(good.write("001.wav", with_other_bytes(good.wav, draw, 44)), max_seconds=30)


def table(good: Good, draw: random.Random) -> None:
    read_table(good.write("text", with_other_bytes("u1 Hello.\nu2 你好。\n".encode(), draw)))


def numbers(good: Good, draw: random.Random) -> None:
    read_numbers(save(spoilt({"u1": [1, 2], "u2": [3]}, draw, POISONS), good.folder / "utt2speech_token.pt"))


def listing(good: Good, draw: random.Random) -> None:
    folder = good.folder / "listed"
    folder.mkdir(exist_ok=True)
    (folder / "1.wav").touch()
    (folder / "a.list").write_bytes(with_other_bytes("1.wav|anna|zh|你好。\n2.wav|anna|en|Hi.\n".encode(), draw))
    find_recordings(folder)


def lexicon(good: Good, draw: random.Random) -> None:
    content = (Path(__file__).parents[2] / "pretrained_models/CosyVoice-mini/lexicon.txt.gz").read_bytes()[:20000]
    read_lexicon(good.write("lexicon.txt.gz", with_other_bytes(content, draw)))


FAMILIES = (
    sidecar, speakers, checkpoint, rows, recipe_rows, model_yaml, weights, weights_bytes, vector, vector_pt, audio,
    table, numbers, listing, lexicon,
)  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.__name__)
def test_what_is_almost_right_is_read_or_refused_in_one_line(
    family: Callable[[Good, random.Random], None], good: Good
) -> None:
    refused = 0
    for number in range(CASES):
        try:
            family(good, random.Random(f"{family.__name__} {number}"))
        except InputError as error:
            refused += 1
            assert str(error) and "\n" not in str(error), f"case {number}"
        except Exception as error:
            raise AssertionError(f"case {number} of {family.__name__} ends in {error!r}") from error
    print(f"{family.__name__}: {CASES} cases, {refused} refused")
    assert refused, "nothing was ever wrong"


def test_what_is_right_is_read(good: Good) -> None:
    (good.output / "voice_joint.json").write_text(json.dumps(good.sidecar))
    assert choose_voice({}, None, good.output, ModelFolder(good.model)).speaker == "anna"
    assert read_spk2info(save(good.speakers, good.folder / "spk2info.pt")).keys() == {"anna", "ben"}
    assert read_run(save(good.checkpoint, good.folder / "joint_flow_only_last.ckpt")).parts == MODES["flow_only"]
    pq.write_table(pa.Table.from_pylist([good.row], SCHEMA), good.folder / "clips-00000.parquet")
    (read,) = read_rows(good.folder / "clips-00000.parquet")
    check_row(good.folder / "clips-00000.parquet", read)
    assert read_wav(good.write("001.wav", good.wav))[1] == 16000
