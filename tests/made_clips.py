"""Made-up clips of one speaker, and settings that train on them in seconds."""

import torch
from torch import Tensor, nn

from cosyvoice.utils.rates_300m import mel_frames
from dataset import Clip

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
