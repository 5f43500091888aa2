"""Made-up clips of one speaker, and settings that train on them in seconds."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor, nn

from cosyvoice.model_folder.folder import ModelFolder
from cosyvoice.utils.rates_300m import mel_frames
from dataset import SCHEMA, Clip

FAST = ["batch_size=1", "accumulate_grad_batches=4", "max_feat_len=40", "learning_rate=0.01"]


def clips(count: int = 10) -> list[Clip]:
    generator = torch.Generator().manual_seed(5)

    def tokens(size: int, most: int) -> Tensor:
        return torch.randint(0, most, (size,), generator=generator)

    made = []
    for i in range(count):
        length = 20 + 3 * i
        embedding = nn.functional.normalize(torch.randn(192, generator=generator), dim=0)
        mel = torch.randn(mel_frames(length), 80, generator=generator)
        made.append(Clip(f"{i:03d}", "ann", tokens(5 + i, 500), tokens(length, 4096), mel, embedding))
    return made


def write_clips(count: int, folder: ModelFolder, data_dir: Path) -> None:
    """Write the clips as prepare_joint_data.py would, without their sound."""
    rows = [
        {
            "utt": clip.utt,
            "spk": clip.speaker,
            "utt_embedding": clip.embedding.tolist(),
            "text_token": clip.text_token.tolist(),
            "speech_token": clip.speech_token.tolist(),
            "speech_feat": clip.mel.flatten().tolist(),
            "speech_feat_shape": list(clip.mel.shape),
            "encoders": folder.encoders(),
        }
        for clip in clips(count)
    ]
    data_dir.mkdir()
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), data_dir / "clips.parquet")
