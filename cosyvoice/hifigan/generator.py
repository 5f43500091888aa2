"""HiFT: a mel spectrogram becomes a waveform through a harmonic source and an inverse Fourier transform.

Li et al. 2023, "HiFTNet: A Fast High-Quality Neural Vocoder with Harmonic-plus-Noise Filter and Inverse
Short Time Fourier Transform", section 2.
"""

from collections.abc import Mapping, Sequence
from math import log, prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import weight_norm

from cosyvoice.hifigan.resblock import ResBlock
from cosyvoice.hifigan.source import FrameSineGen, SineGen, SourceModuleHnNSF
from cosyvoice.utils.rates_300m import SAMPLE_RATE_HZ

MAX_LOG_MAGNITUDE = log(100.0)  # of one spectral bin: exp() of an untrained head, and its gradient, must not overflow
INITIAL_LOG_MAGNITUDE = -4.0  # of every bin: about the level of speech


class HiFTGenerator(nn.Module):
    """A vocoder that turns mel frames of 80 bins into samples in [-audio_limit, audio_limit].

    The keyword arguments are those of the shipped YAML. A frame becomes `samples_per_frame` samples.
    """

    def __init__(
        self,
        *,
        in_channels: int = 80,
        base_channels: int = 512,
        nb_harmonics: int = 8,
        sampling_rate: int,
        nsf_alpha: float = 0.1,
        nsf_sigma: float = 0.003,
        nsf_voiced_threshold: float = 10,
        upsample_rates: Sequence[int] = (8, 8),
        upsample_kernel_sizes: Sequence[int] = (16, 16),
        istft_params: Mapping[str, int],
        resblock_kernel_sizes: Sequence[int] = (3, 7, 11),
        resblock_dilation_sizes: Sequence[Sequence[int]] = ((1, 3, 5), (1, 3, 5), (1, 3, 5)),
        source_resblock_kernel_sizes: Sequence[int] = (7, 11),
        source_resblock_dilation_sizes: Sequence[Sequence[int]] = ((1, 3, 5), (1, 3, 5)),
        lrelu_slope: float = 0.1,
        audio_limit: float = 0.99,
        f0_predictor: nn.Module,
    ) -> None:
        super().__init__()
        self.n_fft, self.hop = istft_params["n_fft"], istft_params["hop_len"]
        self.sampling_rate = sampling_rate
        self.samples_per_frame = prod(upsample_rates) * self.hop
        self.lrelu_slope, self.audio_limit = lrelu_slope, audio_limit
        bins = self.n_fft // 2 + 1

        options = (sampling_rate, nb_harmonics, nsf_alpha, nsf_sigma, nsf_voiced_threshold)
        # as upstream chooses: the weights are trained with one or the other
        by_sample = sampling_rate == SAMPLE_RATE_HZ
        sine_gen = SineGen(*options) if by_sample else FrameSineGen(self.samples_per_frame, *options)
        self.m_source = SourceModuleHnNSF(sine_gen)
        self.conv_pre = weight_norm(nn.Conv1d(in_channels, base_channels, 7, padding=3))
        self.ups, self.source_downs = nn.ModuleList(), nn.ModuleList()
        self.source_resblocks, self.resblocks = nn.ModuleList(), nn.ModuleList()
        for i, (rate, kernel) in enumerate(zip(upsample_rates, upsample_kernel_sizes, strict=True)):
            width = base_channels // 2 ** (i + 1)
            self.ups.append(
                weight_norm(nn.ConvTranspose1d(2 * width, width, kernel, rate, padding=(kernel - rate) // 2))
            )
            # the source's spectrogram has the last stage's frame rate; earlier stages have lower ones
            self.source_downs.append(_downsample(2 * bins, width, factor=prod(upsample_rates[i + 1 :])))
            self.source_resblocks.append(
                ResBlock(width, source_resblock_kernel_sizes[i], source_resblock_dilation_sizes[i])
            )
            for size, dilations in zip(resblock_kernel_sizes, resblock_dilation_sizes, strict=True):
                self.resblocks.append(ResBlock(width, size, dilations))
        self.conv_post = weight_norm(nn.Conv1d(width, 2 * bins, 7, padding=3))
        self.f0_predictor = f0_predictor
        self.register_buffer("stft_window", torch.hann_window(self.n_fft), persistent=False)
        self._init_harmonics(bins)

    @torch.no_grad()
    def _init_harmonics(self, bins: int) -> None:
        """Set initial weights: harmonics in phase, a strong path for the source, and a quiet output.

        With torch's default weights the source contributes a tenth as much as the mel, and training mistakes the frame
        rate for the pitch long before it finds the harmonics.
        """
        self.m_source.l_linear.weight.fill_(1.0)
        self.m_source.l_linear.bias.zero_()
        for down in self.source_downs:
            down.weight.mul_(2.0)
            down.bias.zero_()
        self.conv_post.bias[:bins] = INITIAL_LOG_MAGNITUDE

    def forward(
        self, batch: Mapping[str, Tensor], device: torch.device | str, pitch: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return speech (B, N) and predicted f0 in Hz (B, T) of `batch["speech_feat"]` (B, T, M), for training.

        pitch (B, T) in Hz: the source follows it instead of the predicted f0.
        """
        mel = batch["speech_feat"].to(device).transpose(1, 2)  # (B, T, M) -> (B, M, T)
        f0 = self.f0_predictor(mel)
        return self.decode(mel, self._source(f0 if pitch is None else pitch.to(device))), f0

    @torch.inference_mode()
    def inference(self, speech_feat: Tensor, cache_source: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return speech (1, N) and its source (1, 1, N) for a mel (1, M, T).

        `cache_source` (1, 1, C) is the source that the first C samples had in the previous call. It is reused, so that
        consecutive pieces fit together.
        """
        source = self._source(self.f0_predictor(speech_feat))
        if cache_source is not None and cache_source.shape[-1] > 0:
            source = torch.cat([cache_source, source[..., cache_source.shape[-1] :]], dim=-1)
        return self.decode(speech_feat, source), source

    def decode(self, x: Tensor, s: Tensor) -> Tensor:
        """Return speech (B, N) for a mel (B, M, T) and a source (B, 1, N), where N = T * samples_per_frame."""
        window = self.stft_window
        spectrum = torch.stft(s.squeeze(1), self.n_fft, self.hop, window=window, return_complex=True)
        source = torch.cat([spectrum.real, spectrum.imag], dim=1)  # (B, 2 * bins, frames)
        x = self.conv_pre(x)
        for stage in range(len(self.ups)):
            x = self._upsample(x, source, stage)
        # 0.01, not lrelu_slope: the pretrained weights were trained with torch's default here
        head = self.conv_post(F.leaky_relu(x, 0.01))
        log_magnitude, phase = head.chunk(2, dim=1)  # each (B, bins, frames)
        magnitude = log_magnitude.clamp(max=MAX_LOG_MAGNITUDE).exp()
        phase = phase.sin()
        spectrum = torch.complex(magnitude * phase.cos(), magnitude * phase.sin())
        speech = torch.istft(spectrum, self.n_fft, self.hop, window=window)
        return speech.clamp(-self.audio_limit, self.audio_limit)

    def remove_weight_norm(self) -> None:
        """Fold every normalised weight into a plain one, which makes inference faster and leaves the output the same.

        The state dict's names change too, so load weights first.
        """
        for module in list(self.modules()):
            if parametrize.is_parametrized(module, "weight"):
                parametrize.remove_parametrizations(module, "weight")

    def _source(self, f0: Tensor) -> Tensor:
        f0 = f0.unsqueeze(1).repeat_interleave(self.samples_per_frame, dim=-1)  # (B, T) -> (B, 1, N)
        return self.m_source(f0)

    def _upsample(self, x: Tensor, source: Tensor, stage: int) -> Tensor:
        """Upsample (B, 2C, T) to (B, C, T * rate), add the source, and apply the stage's residual blocks."""
        x = self.ups[stage](F.leaky_relu(x, self.lrelu_slope))
        if stage == len(self.ups) - 1:
            x = F.pad(x, (1, 0), mode="reflect")  # a centred transform of n samples has n / hop + 1 frames
        x = x + self.source_resblocks[stage](self.source_downs[stage](source))
        stacks = len(self.resblocks) // len(self.ups)
        blocks = self.resblocks[stage * stacks : (stage + 1) * stacks]
        return sum(block(x) for block in blocks) / stacks


def _downsample(in_channels: int, out_channels: int, factor: int) -> nn.Conv1d:
    if factor == 1:
        return nn.Conv1d(in_channels, out_channels, kernel_size=1)
    return nn.Conv1d(in_channels, out_channels, kernel_size=2 * factor, stride=factor, padding=factor // 2)
