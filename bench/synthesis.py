"""Time from tokens to speech: flow, vocoder, a whole sentence, and the first sound of a stream.

    python bench/synthesis.py

At the sizes of CosyVoice-300M and CosyVoice-mini with random weights; `--model-dir` measures a model of your own. The
language model writes five speech tokens for each text token and never ends by itself, so that sentences of one length
are the same work. A share of the limit is the least time over the time taken. The least time of flow and vocoder is
that of their floating-point operations at the speed of a large float32 matrix product; that of the language model is
the time in which the machine reads its weights in float32, once for each speech token; a sentence's is the sum. (A
cache that holds all weights of a small model is faster than that, and fewer bits may be.) The flow's mel error is the
mean absolute difference to float32. Each row follows as a line of JSON.
"""

import argparse
import copy
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from measuring import (
    BYTES_PER_FLOAT32,
    Machine,
    add_device,
    add_measuring,
    add_models,
    add_precisions,
    build,
    count_flops,
    measure_machine,
    positive,
    precisions,
    repeated,
    show,
    sources,
    step_weights,
)

if TYPE_CHECKING:
    from torch import Tensor, nn

SPEECH_PER_TEXT = 5  # tokens, about as many as in read English
STREAMED_TEXT = 60  # tokens: the language model still writes while the first chunk becomes sound


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    machine = measure_machine(args)
    import torch

    for name, source in sources(args).items():
        for precision in precisions(args):
            torch.manual_seed(args.seed)
            speaker = Speaker(machine, name, precision, source, args.repeats)
            for text_tokens in args.text_tokens:
                speaker.measure_sentence(text_tokens)
            speaker.measure_first_sound()
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_models(parser)
    add_precisions(parser)
    parser.add_argument("--text-tokens", type=positive, nargs="+", default=(30, 60), metavar="N",
                        help="lengths of the sentences; 30 are 3 s of speech (default: 30 60)")  # fmt: skip
    add_device(parser)
    add_measuring(parser, 3)
    return parser.parse_args(argv)


class Speaker:
    """A model that speaks random text in a random voice, in sentences of any wanted length."""

    def __init__(self, machine: Machine, name: str, precision: str, source: Path, repeats: int) -> None:
        import torch

        from cosyvoice.cli.model import CosyVoiceModel
        from cosyvoice.cli.speech_model import MODEL_PARTS
        from cosyvoice.utils.frames import SPEAKER_DIMENSIONS

        self.machine, self.name, self.precision, self.repeats = machine, name, precision, repeats
        llm, flow, hift = (build(source, part) for part in MODEL_PARTS)
        self.plain_flow = copy.deepcopy(flow).to(machine.device)
        self.text_size, self.speech_size = llm.text_embedding.num_embeddings, llm.speech_token_size
        self.step_seconds = BYTES_PER_FLOAT32 * step_weights(llm) / machine.bytes_per_second
        self.model = CosyVoiceModel(llm, flow, hift, device=machine.device, precision=precision)
        self.model.load(llm.state_dict(), flow.state_dict(), hift.state_dict())  # their own, in the form that speaks
        llm.bounds = lambda text, *_ratios: 2 * (SPEECH_PER_TEXT * text.size(1),)
        self.embedding = torch.randn(1, SPEAKER_DIMENSIONS, device=machine.device)

    def measure_sentence(self, text_tokens: int) -> None:
        """Flow and vocoder by themselves, then all three parts."""
        tokens = SPEECH_PER_TEXT * text_tokens
        flow, plain_flow = (partial(self.flow_mel, module, tokens) for module in (self.model.flow, self.plain_flow))
        vocoder = partial(self.vocode, tokens)
        mel_error = (flow() - plain_flow()).abs().mean().item()  # warms up, as counting does
        flow_limit, vocoder_limit = self.least_seconds(plain_flow), self.least_seconds(vocoder)
        sentence_limit = tokens * self.step_seconds + flow_limit + vocoder_limit
        self.measure("flow", flow, tokens, flow_limit, mel_error=mel_error)
        self.measure("vocoder", vocoder, tokens, vocoder_limit)
        self.measure("sentence", lambda: list(self.tts(text_tokens)), tokens, sentence_limit)

    def measure_first_sound(self) -> None:
        """From the text to the first piece of a stream: the language model writes one chunk, which becomes sound."""
        heard = self.model.token_min_hop_len
        tokens = heard + self.model.token_overlap_len
        limit = self.least_seconds(partial(self.flow_mel, self.plain_flow, tokens))
        limit += self.least_seconds(partial(self.vocode, heard))

        def first_sound() -> None:
            with closing(self.tts(STREAMED_TEXT, stream=True)) as pieces:
                next(pieces)

        seconds = repeated(first_sound, self.repeats, self.machine.device)
        show(self.machine, self.labels("first sound", tokens), seconds, tokens * self.step_seconds + limit)

    def flow_mel(self, flow: "nn.Module", tokens: int) -> "Tensor":
        """(1, 80, T) of random tokens, from the same random numbers each time."""
        import torch

        from cosyvoice.cli.speech_model import NO_MEL, NO_TOKENS

        device = self.machine.device
        torch.manual_seed(0)
        speech = torch.randint(0, self.speech_size, (1, tokens), device=device)
        count, zero = torch.tensor([[tokens], [0]], device=device)
        no_prompt = (NO_TOKENS.to(device), zero, NO_MEL.to(device), zero)
        return flow.inference(speech, count, *no_prompt, self.embedding, None)[0]

    def vocode(self, tokens: int) -> None:
        """Noise of these tokens' length."""
        import torch

        from cosyvoice.utils.frames import MEL_BINS

        noise = torch.randn(1, MEL_BINS, self.plain_flow.mel_frames(tokens), device=self.machine.device)
        self.model.hift.inference(noise)

    def measure(self, what: str, work: Callable[[], Any], tokens: int, limit_seconds: float, **figures: float) -> None:
        seconds = repeated(work, self.repeats, self.machine.device)
        factor = statistics.median(seconds) / (tokens / self.plain_flow.input_frame_rate)
        show(self.machine, self.labels(what, tokens), seconds, limit_seconds, real_time_factor=factor, **figures)

    def labels(self, what: str, tokens: int) -> dict[str, Any]:
        return {
            "bench": "synthesis", "model": self.name, "what": what, "precision": self.precision, "speech_tokens": tokens
        }  # fmt: skip

    def least_seconds(self, work: Callable[[], Any]) -> float:
        """By its floating-point operations. The one run in which they are counted also warms up."""
        return count_flops(work) / self.machine.flops_per_second

    def tts(self, text_tokens: int, stream: bool = False) -> "Iterator[dict[str, Tensor]]":
        """The pieces of random text."""
        import torch

        text = torch.randint(0, self.text_size, (1, text_tokens))
        return self.model.tts(text=text, flow_embedding=self.embedding, llm_embedding=self.embedding, stream=stream)


if __name__ == "__main__":
    from cosyvoice.runtime.command import run

    run(main)
