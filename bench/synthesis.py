"""Time from tokens to speech: flow, vocoder, a whole sentence, the first sound of a stream, and its later chunks.

    python bench/synthesis.py

At the sizes of CosyVoice-300M, CosyVoice-mini and CosyVoice2 with random weights; `--model-dir` measures a model of
your own. The language model writes a tenth of a second of speech for each text token and never ends by itself, so that
sentences of one length are the same work. A share of the limit is the least time over the time taken. The least time of
flow and vocoder is that of their floating-point operations at the speed of a large float32 matrix product; that of the
language model is the time in which the machine reads its weights in float32, once for each speech token; a sentence's
is the sum. (A cache that holds all weights of a small model is faster than that, and fewer bits may be.) The flow's mel
error is the mean absolute difference to float32. A chunk is the one in which some second of a stream is first heard:
flow and vocoder alone. Its growth is its time a token over that of the first such chunk, and should stay near 1. Each
row follows as a line of JSON.
"""

import argparse
import copy
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from functools import partial
from itertools import repeat
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
    model_folder,
    positive,
    precisions,
    repeated,
    show,
    sources,
    step_weights,
    timed,
)

if TYPE_CHECKING:
    from torch import Tensor

    from cosyvoice.cli.speech_model import Session, SpeechModel

TEXT_RATE = 10  # tokens a second, of each model the same
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
            speaker.measure_stream(args.stream_seconds)
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_models(parser)
    add_precisions(parser)
    parser.add_argument("--text-tokens", type=positive, nargs="+", default=(30, 60), metavar="N",
                        help="lengths of the sentences; 30 are 3 s of speech (default: 30 60)")  # fmt: skip
    parser.add_argument("--stream-seconds", type=positive, nargs="+", default=(5, 10, 20), metavar="N",
                        help="where in a stream a chunk is timed (default: 5 10 20)")  # fmt: skip
    add_device(parser)
    add_measuring(parser, 3)
    return parser.parse_args(argv)


class Speaker:
    """A model that speaks random text in a random voice, in sentences of any wanted length."""

    def __init__(self, machine: Machine, name: str, precision: str, source: Path, repeats: int) -> None:
        import torch

        from cosyvoice.cli.cosyvoice import kind_of
        from cosyvoice.cli.speech_model import MODEL_PARTS, NO_MEL, NO_TOKENS
        from cosyvoice.utils.frames import SPEAKER_DIMENSIONS

        self.machine, self.name, self.precision, self.repeats = machine, name, precision, repeats
        llm, flow, hift = (build(source, part) for part in MODEL_PARTS)
        self.text_size, self.speech_size = llm.text_embedding.num_embeddings, llm.speech_token_size
        self.step_seconds = BYTES_PER_FLOAT32 * step_weights(llm) / machine.bytes_per_second
        self.rates = model_folder(source).rates
        model_class = kind_of(model_folder(source)).model_class
        self.plain = model_class(llm, copy.deepcopy(flow), hift, device=machine.device)  # whose operations count
        self.model = model_class(llm, flow, hift, device=machine.device, precision=precision)
        self.model.load(llm.state_dict(), flow.state_dict(), hift.state_dict())  # their own, in the form that speaks
        llm.bounds = lambda text, *_ratios: 2 * (self.speech_tokens(text.size(1)),)
        self.embedding = torch.randn(1, SPEAKER_DIMENSIONS, device=machine.device)
        self.no_prompt = [x.to(machine.device) for x in (NO_TOKENS, NO_MEL)]

    def measure_sentence(self, text_tokens: int) -> None:
        """Flow and vocoder by themselves, then all three parts."""
        tokens = self.speech_tokens(text_tokens)
        flow, plain_flow = (partial(self.flow_mel, model, tokens) for model in (self.model, self.plain))
        vocoder = partial(self.vocode, tokens)
        mel_error = (flow() - plain_flow()).abs().mean().item()  # warms up, as counting does
        flow_limit, vocoder_limit = self.least_seconds(plain_flow), self.least_seconds(vocoder)
        sentence_limit = tokens * self.step_seconds + flow_limit + vocoder_limit
        self.measure("flow", flow, tokens, flow_limit, mel_error=mel_error)
        self.measure("vocoder", vocoder, tokens, vocoder_limit)
        self.measure("sentence", lambda: list(self.tts(text_tokens)), tokens, sentence_limit)

    def measure_first_sound(self) -> None:
        """From the text to the first piece of a stream: the language model writes one chunk, which becomes sound."""
        chunk, _ = next(self.model.chunks(repeat(0), 0))
        limit = self.least_seconds(partial(self.sound, self.plain, chunk, self.plain.new_session()))
        limit += len(chunk) * self.step_seconds

        def first_sound() -> None:
            with closing(self.tts(STREAMED_TEXT, stream=True)) as pieces:
                next(pieces)

        seconds = repeated(first_sound, self.repeats, self.machine.device)
        show(self.machine, self.labels("first sound", len(chunk)), seconds, limit)

    def measure_stream(self, places: Sequence[int]) -> None:
        """Flow and vocoder of the chunks in which these seconds of a stream are first heard."""
        taken: dict[int, list[float]] = {place: [] for place in sorted(places)}
        tokens: dict[int, int] = {}
        repeated(partial(self.stream, taken, tokens), self.repeats)
        a_token = {place: statistics.median(seconds) / tokens[place] for place, seconds in taken.items()}
        for place, seconds in taken.items():
            labels = self.labels(f"chunk at {place} s", tokens[place])
            show(self.machine, labels, seconds, None, growth=a_token[place] / a_token[min(taken)])

    def stream(self, taken: dict[int, list[float]], tokens: dict[int, int]) -> None:
        """Speak a stream as far as its last place, and note the seconds and the tokens of the chunk at each."""
        session, heard, last = self.model.new_session(), 0.0, max(taken)
        for chunk, _ in self.model.chunks(repeat(0), 0):
            pieces: list[Tensor] = []
            seconds = timed(lambda: pieces.append(self.sound(self.model, chunk, session)), self.machine.device)  # noqa: B023
            before, heard = heard, heard + pieces[0].size(1) / self.rates.sample_rate
            for place in taken:
                if before <= place < heard:
                    taken[place].append(seconds)
                    tokens[place] = len(chunk)
            if heard > last:
                return

    def sound(self, model: "SpeechModel", chunk: list[int], session: "Session") -> "Tensor":
        """(1, samples) of a chunk of a stream that goes on."""
        import torch

        token = torch.tensor([chunk], device=self.machine.device)
        return model.token2wav(token, *self.no_prompt, self.embedding, session)

    def flow_mel(self, model: "SpeechModel", tokens: int) -> "Tensor":
        """(1, 80, T) of random tokens, from the same random numbers each time."""
        import torch

        torch.manual_seed(0)
        speech = torch.randint(0, self.speech_size, (1, tokens), device=self.machine.device)
        return model.next_mel(speech, *self.no_prompt, self.embedding, model.new_session(), finalize=True)

    def vocode(self, tokens: int) -> None:
        """Noise of these tokens' length."""
        import torch

        from cosyvoice.utils.frames import MEL_BINS

        noise = torch.randn(1, MEL_BINS, self.model.flow.mel_frames(tokens), device=self.machine.device)
        self.model.hift.inference(noise)

    def measure(self, what: str, work: Callable[[], Any], tokens: int, limit_seconds: float, **figures: float) -> None:
        seconds = repeated(work, self.repeats, self.machine.device)
        factor = statistics.median(seconds) / (tokens / self.rates.token_rate)
        show(self.machine, self.labels(what, tokens), seconds, limit_seconds, real_time_factor=factor, **figures)

    def speech_tokens(self, text_tokens: int) -> int:
        return text_tokens * self.rates.token_rate // TEXT_RATE

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
