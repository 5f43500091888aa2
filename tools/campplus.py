"""CAM++, a speaker verification network (Wang et al. 2023, "CAM++: A Fast and Efficient Network for Speaker
Verification Using Context-Aware Masking").

Two-dimensional convolutions process the spectrum first. Three blocks of time-delay layers follow. Each layer sees the
outputs of all earlier layers of its block, and masks its channels by their context. The names and shapes of the weights
are those of 3D-Speaker's `campplus_cn_en_common.pt`.

Axes: B batch, C channels, M mel bins, T frames of 10 ms, S frames of 20 ms.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cosyvoice.model_folder.weights import NoRandomInit, load_strict, read_state_dict

MELS = 80
HEAD_CHANNELS = 32
HEAD_STRIDE = 8  # input mel bins per output bin
CHANNELS = 128  # before the first block, and inside each layer
GROWTH = 32  # channels that a layer adds
BLOCKS = ((12, 1), (24, 2), (16, 2))  # layers, dilation
MASK_FRAMES = 100  # per segment; a frame's mask sees the means of its segment and of all frames
DIMENSIONS = 192


class CAMPlus(nn.Module):
    """A network from Kaldi filterbanks (B, T, 80), 100 frames a second minus the mean, to speaker vectors (B, 192)."""

    def __init__(self) -> None:
        super().__init__()
        self.head = Head()
        channels = CHANNELS
        layers: dict[str, nn.Module] = {"tdnn": TimeDelay(HEAD_CHANNELS * MELS // HEAD_STRIDE, channels)}
        for number, (count, dilation) in enumerate(BLOCKS, start=1):
            layers[f"block{number}"] = DenseBlock(channels, count, dilation)
            channels += count * GROWTH
            layers[f"transit{number}"] = Transit(channels, channels // 2)
            channels //= 2
        layers["out_nonlinear"] = NormRelu(channels)
        layers["stats"] = MeanAndDeviation()
        layers["dense"] = Projection(2 * channels, DIMENSIONS)
        self.xvector = nn.ModuleDict(layers)

    def forward(self, fbank: Tensor) -> Tensor:
        x = self.head(fbank.transpose(1, 2))  # (B, T, M) -> (B, C, T)
        for layer in self.xvector.values():
            x = layer(x)
        return x  # (B, 192)


class Head(nn.Module):
    """Convolutions over mel bins and frames, (B, M, T) to (B, 320, T), which keep the frame rate."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = convolution2d(1, HEAD_CHANNELS)
        self.bn1 = nn.BatchNorm2d(HEAD_CHANNELS)
        self.layer1 = nn.Sequential(Residual(mel_stride=2), Residual(mel_stride=1))
        self.layer2 = nn.Sequential(Residual(mel_stride=2), Residual(mel_stride=1))
        self.conv2 = convolution2d(HEAD_CHANNELS, HEAD_CHANNELS, mel_stride=2)
        self.bn2 = nn.BatchNorm2d(HEAD_CHANNELS)

    def forward(self, mel: Tensor) -> Tensor:
        x = self.bn1(self.conv1(mel[:, None])).relu()  # (B, C, M, T)
        x = self.layer2(self.layer1(x))
        x = self.bn2(self.conv2(x)).relu()  # (B, C, M / 8, T)
        return x.flatten(1, 2)


class Residual(nn.Module):
    """Two convolutions over (B, C, M, T) with a shortcut."""

    def __init__(self, mel_stride: int) -> None:
        super().__init__()
        self.conv1 = convolution2d(HEAD_CHANNELS, HEAD_CHANNELS, mel_stride)
        self.bn1 = nn.BatchNorm2d(HEAD_CHANNELS)
        self.conv2 = convolution2d(HEAD_CHANNELS, HEAD_CHANNELS)
        self.bn2 = nn.BatchNorm2d(HEAD_CHANNELS)
        self.shortcut = nn.Sequential()
        if mel_stride > 1:
            self.shortcut.append(convolution2d(HEAD_CHANNELS, HEAD_CHANNELS, mel_stride, kernel=1))
            self.shortcut.append(nn.BatchNorm2d(HEAD_CHANNELS))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn1(self.conv1(x)).relu()
        return (self.bn2(self.conv2(y)) + self.shortcut(x)).relu()


def convolution2d(channels: int, out_channels: int, mel_stride: int = 1, kernel: int = 3) -> nn.Conv2d:
    return nn.Conv2d(channels, out_channels, kernel, (mel_stride, 1), padding=kernel // 2, bias=False)


class NormRelu(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.batchnorm = nn.BatchNorm1d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.batchnorm(x).relu()


class TimeDelay(nn.Module):
    """A convolution over time that halves the rate: (B, C, T) to (B, C', S)."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.linear = nn.Conv1d(channels, out_channels, 5, stride=2, padding=2, bias=False)
        self.nonlinear = NormRelu(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.nonlinear(self.linear(x))


class DenseBlock(nn.ModuleDict):
    """Layers that each append GROWTH channels to their input: (B, C, S) to (B, C + count * GROWTH, S)."""

    def __init__(self, channels: int, count: int, dilation: int) -> None:
        super().__init__({f"tdnnd{n + 1}": DenseLayer(channels + n * GROWTH, dilation) for n in range(count)})

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.values():
            x = torch.cat([x, layer(x)], dim=1)
        return x


class DenseLayer(nn.Module):
    """A bottleneck layer with a masked convolution: (B, C, S) to (B, GROWTH, S)."""

    def __init__(self, channels: int, dilation: int) -> None:
        super().__init__()
        self.nonlinear1 = NormRelu(channels)
        self.linear1 = nn.Conv1d(channels, CHANNELS, 1, bias=False)
        self.nonlinear2 = NormRelu(CHANNELS)
        self.cam_layer = MaskedConvolution(dilation)

    def forward(self, x: Tensor) -> Tensor:
        return self.cam_layer(self.nonlinear2(self.linear1(self.nonlinear1(x))))


class MaskedConvolution(nn.Module):
    """A convolution whose channels are scaled between 0 and 1 by their context (section 2.2)."""

    def __init__(self, dilation: int) -> None:
        super().__init__()
        self.linear_local = nn.Conv1d(CHANNELS, GROWTH, 3, padding=dilation, dilation=dilation, bias=False)
        self.linear1 = nn.Conv1d(CHANNELS, CHANNELS // 2, 1)
        self.linear2 = nn.Conv1d(CHANNELS // 2, GROWTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        segments = F.avg_pool1d(x, MASK_FRAMES, MASK_FRAMES, ceil_mode=True)  # (B, C, segments)
        nearby = segments.repeat_interleave(MASK_FRAMES, dim=2)[..., : x.shape[2]]  # (B, C, S)
        context = x.mean(dim=2, keepdim=True) + nearby
        mask = self.linear2(self.linear1(context).relu()).sigmoid()
        return self.linear_local(x) * mask


class Transit(nn.Module):
    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.nonlinear = NormRelu(channels)
        self.linear = nn.Conv1d(channels, out_channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.nonlinear(x))


class MeanAndDeviation(nn.Module):
    """Mean and standard deviation over time: (B, C, S) to (B, 2 C, 1)."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x.mean(dim=2, keepdim=True), x.std(dim=2, keepdim=True)], dim=1)


class Projection(nn.Module):
    """A linear layer and batch norm: (B, C, 1) to (B, C')."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.linear = nn.Conv1d(channels, out_channels, 1, bias=False)
        self.nonlinear = nn.ModuleDict({"batchnorm": nn.BatchNorm1d(out_channels, affine=False)})

    def forward(self, x: Tensor) -> Tensor:
        return self.nonlinear["batchnorm"](self.linear(x)[..., 0])


def load_campplus(weights: Path) -> CAMPlus:
    """Return the network with the weights of a file, in eval mode. Raises InputError if they do not fit."""
    with NoRandomInit():
        network = CAMPlus()
    load_strict(network, read_state_dict(weights), str(weights))
    return network.eval()
