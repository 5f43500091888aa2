"""The public API: a model folder in, speech out. Names and signatures are upstream's."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from cosyvoice.cli.frontend import FRONTEND_PARTS, Prompt, open_front_end
from cosyvoice.cli.model import CosyVoiceModel, Weights, check_speed
from cosyvoice.model_folder.folder import ModelFolder
from cosyvoice.model_folder.weights import NoRandomInit
from cosyvoice.utils.draws import Draws
from cosyvoice.utils.errors import InputError
from cosyvoice.utils.file_utils import save_tensors
from cosyvoice.utils.frontend_utils import has_words
from cosyvoice.utils.rates_300m import TOKEN_RATE_HZ

MODEL_PARTS = ("llm", "flow", "hift")

Speech = Iterator[dict[str, Tensor]]


class CosyVoice:
    """Speaks with a CosyVoice-300M, -SFT or -Instruct folder.

    Every `inference_*` yields `{"tts_speech": (1, samples)}` with float32 samples in [-1, 1] on the CPU, at
    `sample_rate` Hz: one for each sentence-sized piece of the text, or with `stream` one about every 2 seconds.
    `speed` is 0.5 to 2 and not for streams. `text_frontend` False takes the text as it is. A prompt recording is
    at most 30 s long. InputError says what the caller can mend.

    Args:
        model_dir: folder with cosyvoice.yaml, llm.pt, flow.pt, hift.pt, the two .onnx files, maybe spk2info.pt
        load_jit, load_trt, trt_concurrent: upstream's accelerators, which are not supported here
        fp16: on a GPU the same as precision="float16"; changes nothing on a CPU
        device: where to compute, e.g. "cpu"; by default a GPU where one can compute
        weights: files, or tensors by name, to load in place of the folder's own, by part: "llm", "flow", "hift"
        precision: of language model and flow. "float32" is exact. On a GPU "float16" keeps both in half precision. On a
            CPU "float16" (of the language model alone), "bfloat16" (where the processor has it) and "int8" are faster
    """

    def __init__(
        self,
        model_dir: str | Path,
        load_jit: bool = False,
        load_trt: bool = False,
        fp16: bool = False,
        trt_concurrent: int = 1,
        device: str | None = None,
        weights: Mapping[str, Weights] | None = None,
        precision: str = "float32",
    ) -> None:
        if load_jit or load_trt or trt_concurrent != 1:
            raise InputError("load_jit, load_trt and trt_concurrent are not supported here; leave them out")
        self.model_dir = Path(model_dir)
        folder = ModelFolder(model_dir)
        with NoRandomInit():
            parts = folder.parts((*FRONTEND_PARTS, *MODEL_PARTS, "text_split"), {"text_split": None})
        if parts["flow"].input_frame_rate != TOKEN_RATE_HZ:
            raise InputError(f"{model_dir} is not a {TOKEN_RATE_HZ} Hz model; use CosyVoice-300M, -SFT or -Instruct")
        modules = [parts[name] for name in MODEL_PARTS]
        self.model = CosyVoiceModel(*modules, fp16=fp16, device=device, precision=precision)
        self.frontend = open_front_end(folder, parts, "cpu" if self.model.device.type == "cpu" else "auto")
        self.sample_rate = self.frontend.sample_rate
        files = {name: folder.weights(name) for name in MODEL_PARTS} | dict(weights or {})
        self.model.load(*(files[name] for name in MODEL_PARTS))

    def list_available_spks(self) -> list[str]:
        """Names of the stored voices."""
        return list(self.frontend.spk2info)

    def add_zero_shot_spk(self, prompt_text: str, prompt_wav: Prompt, zero_shot_spk_id: str) -> bool:
        """Keep a prompt under a name, so that later calls need only `zero_shot_spk_id`. Returns True.

        The name also serves `inference_sft`, which uses the speaker vector alone.
        """
        if not zero_shot_spk_id:
            raise InputError("zero_shot_spk_id is empty; give the voice a name")
        prompt_text = self.frontend.text_normalize(prompt_text, split=False)
        voice = self.frontend.prompt_inputs(prompt_text, prompt_wav)
        self.frontend.spk2info[zero_shot_spk_id] = voice | {"embedding": voice["flow_embedding"]}
        return True

    def save_spkinfo(self) -> None:
        """Write the stored voices to the model folder's spk2info.pt."""
        save_tensors(self.frontend.spk2info, ModelFolder(self.model_dir).stored_speakers)

    def inference_sft(
        self,
        tts_text: str,
        spk_id: str,
        stream: bool = False,
        speed: float = 1.0,
        text_frontend: bool = True,
    ) -> Speech:
        """Speak with a stored voice."""
        inputs = partial(self.frontend.frontend_sft, spk_id=spk_id)
        return self._speak(inputs, tts_text, text_frontend, stream, speed)

    def inference_zero_shot(
        self,
        tts_text: str,
        prompt_text: str,
        prompt_wav: Prompt,
        zero_shot_spk_id: str = "",
        stream: bool = False,
        speed: float = 1.0,
        text_frontend: bool = True,
    ) -> Speech:
        """Speak in the voice and manner of a recording whose text is known, or of a stored prompt."""
        inputs = partial(
            self.frontend.frontend_zero_shot,
            prompt_text=self.frontend.text_normalize(prompt_text, split=False, text_frontend=text_frontend),
            prompt_wav=prompt_wav,
            zero_shot_spk_id=zero_shot_spk_id,
        )
        return self._speak(inputs, tts_text, text_frontend, stream, speed)

    def inference_cross_lingual(
        self,
        tts_text: str,
        prompt_wav: Prompt,
        zero_shot_spk_id: str = "",
        stream: bool = False,
        speed: float = 1.0,
        text_frontend: bool = True,
    ) -> Speech:
        """Speak in the voice of a recording or of a stored prompt, in any language."""
        inputs = partial(
            self.frontend.frontend_cross_lingual, prompt_wav=prompt_wav, zero_shot_spk_id=zero_shot_spk_id
        )
        return self._speak(inputs, tts_text, text_frontend, stream, speed)

    def inference_instruct(
        self,
        tts_text: str,
        spk_id: str,
        instruct_text: str,
        stream: bool = False,
        speed: float = 1.0,
        text_frontend: bool = True,
    ) -> Speech:
        """Speak with a stored voice in the manner that `instruct_text` describes; for the -Instruct model."""
        instruct_text = self.frontend.text_normalize(instruct_text, split=False, text_frontend=text_frontend)
        inputs = partial(self.frontend.frontend_instruct, spk_id=spk_id, instruct_text=instruct_text)
        return self._speak(inputs, tts_text, text_frontend, stream, speed)

    def inference_vc(
        self, source_wav: Prompt, prompt_wav: Prompt, stream: bool = False, speed: float = 1.0
    ) -> Speech:
        """Say what one recording says in the voice of another."""
        inputs = self.frontend.frontend_vc(source_wav, prompt_wav)
        yield from self.model.tts(**inputs, stream=stream, speed=speed)

    def _speak(
        self,
        inputs: Callable[[str], dict[str, Tensor]],
        tts_text: str,
        text_frontend: bool,
        stream: bool,
        speed: float,
    ) -> Speech:
        for piece in self.split(tts_text, text_frontend):
            yield from self.model.tts(**inputs(piece), stream=stream, speed=speed)

    def split(self, tts_text: str, text_frontend: bool = True) -> list[str]:
        """The pieces that a text is spoken in. Raises InputError where it has nothing to speak."""
        pieces = self.frontend.text_normalize(tts_text, split=True, text_frontend=text_frontend)
        pieces = [piece for piece in pieces if has_words(piece)]
        if not pieces:
            raise InputError(f"nothing to speak in the text {tts_text!r}; give it words or numbers")
        return pieces

    def speak_together(
        self, pieces: Sequence[str], spk_id: str, draws: Sequence[Draws], speed: float = 1.0
    ) -> Iterator[Tensor]:
        """The speech (1, samples) of each of several pieces of `split` with a stored voice; faster than one by one.

        draws: where each piece has its random numbers from. All pieces are written before the first is heard.
        """
        check_speed(speed)
        inputs = [self.frontend.frontend_sft(piece, spk_id=spk_id) for piece in pieces]
        texts, embedding = [entry["text"] for entry in inputs], inputs[0]["llm_embedding"]
        yield from self.model.tts_together(texts, embedding, draws, speed)


def AutoModel(model_dir: str | Path, **options: Any) -> CosyVoice:
    """The model of a folder, whose kind upstream finds out; here there is one kind. options: those of CosyVoice."""
    return CosyVoice(model_dir, **options)
