"""The API that both generations share: it opens a folder, keeps voices, and speaks in the modes that both have."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from cosyvoice.cli.frontend import FRONTEND_PARTS, CosyVoiceFrontEnd, Prompt, open_front_end
from cosyvoice.cli.speech_model import MODEL_PARTS, SpeechModel, Weights, check_speed
from cosyvoice.model_folder.folder import Generation, ModelFolder, as_folder
from cosyvoice.model_folder.weights import NoRandomInit
from cosyvoice.runtime.draws import Draws
from cosyvoice.runtime.errors import InputError
from cosyvoice.utils.file_utils import save_tensors
from cosyvoice.utils.frontend_utils import has_words, nothing_to_speak

Text = str | Iterator[str]  # whole, or in pieces that are still being written
Speech = Iterator[dict[str, Tensor]]

VOICE_NAME = "voice"  # the name under which callers put a speaker vector into the front end

logger = logging.getLogger(__name__)


class FolderVoice:
    """An opened model folder that speaks. Subclasses name its generation, and the classes of its model and front end.

    Every `inference_*` yields `{"tts_speech": (1, samples)}` with float32 samples in [-1, 1] on the CPU, at
    `sample_rate` Hz: one for each sentence-sized piece of the text, or one for each chunk with `stream`. A text of
    punctuation alone yields nothing and logs a warning; an empty one is an error. `speed` is 0.5 to 2, and 1 for
    streams. With `text_frontend` False the text is not normalised. A prompt recording lasts at most 30 s. InputError
    means that the caller can correct something.
    """

    generation: Generation
    model_class: type[SpeechModel]
    frontend_class: type[CosyVoiceFrontEnd]

    def __init__(
        self,
        model_dir: str | Path | ModelFolder,
        accelerators: Mapping[str, bool],
        fp16: bool,
        device: str | None,
        weights: Mapping[str, Weights] | None,
        precision: str,
    ) -> None:
        """Open the folder. accelerators: whether the caller asks for them, by name. For the others see `CosyVoice`."""
        folder = as_folder(model_dir)
        self.model_dir = str(folder.path)  # which programs put before "/spk2info.pt"
        self._check_generation(folder)
        for name in (name for name, wanted in accelerators.items() if wanted):
            logger.warning("%s is not supported here. Going on without it", name)
        files = {name: folder.weights(name) for name in MODEL_PARTS} | dict(weights or {})
        parts = {name: given for name, given in files.items() if isinstance(given, nn.Module)}
        missing = [name for name in MODEL_PARTS if name not in parts]
        parts |= self._build(folder, *FRONTEND_PARTS, *missing, "text_split")
        if parts["flow"].input_frame_rate != folder.rates.token_rate:
            raise InputError(
                f"{folder.yaml}: the flow reads {parts['flow'].input_frame_rate} speech tokens a second, but the model "
                f"has {folder.rates.token_rate}. Use one of {', '.join(self.generation.models)}"
            )
        modules = [parts[name] for name in MODEL_PARTS]
        options = {"fp16": fp16, "device": device, "precision": precision}
        self.model = self.model_class(*modules, **options, rebuild=lambda name: self._build(folder, name)[name])
        self.fp16 = self.model.fp16
        if fp16 and not self.fp16:
            logger.warning("fp16 is for GPUs. Computing in float32")
        encoder_device = "cpu" if self.model.device.type == "cpu" else "auto"
        self.frontend = open_front_end(folder, parts, encoder_device, self.frontend_class)
        self.sample_rate = self.frontend.sample_rate
        self.model.load(*(files[name] for name in MODEL_PARTS))

    @staticmethod
    def _build(folder: ModelFolder, *names: str) -> dict[str, Any]:
        """Return parts of the folder's YAML with undefined weights."""
        with NoRandomInit():
            return folder.parts(names, {"text_split": None})

    def _check_generation(self, folder: ModelFolder) -> None:
        if folder.generation is not self.generation and folder.yaml.is_file():
            raise InputError(f"{folder.path} is a {folder.generation.name} folder. Open it with AutoModel")
        if not (yaml := folder.path / self.generation.yaml).is_file():
            raise InputError(f"{yaml} does not exist. Copy the whole folder of {self.generation.name} again")

    def list_available_spks(self) -> list[str]:
        """Return the names of the stored voices."""
        return list(self.frontend.spk2info)

    def add_zero_shot_spk(self, prompt_text: str, prompt_wav: Prompt, zero_shot_spk_id: str) -> bool:
        """Keep a prompt under a name, so that later calls need only `zero_shot_spk_id`. Return True.

        `inference_sft` knows the name too, and uses the speaker vector alone. Raises InputError if the name is empty.
        """
        if not zero_shot_spk_id:
            raise InputError("zero_shot_spk_id is empty. Give the voice a name")
        prompt_text = self.frontend.text_normalize(prompt_text, split=False)
        voice = self.frontend.prompt_inputs(prompt_text, prompt_wav)
        self.frontend.spk2info[zero_shot_spk_id] = voice | {"embedding": voice["flow_embedding"]}
        return True

    def save_spkinfo(self) -> None:
        """Write the stored voices to the model folder's spk2info.pt."""
        save_tensors(self.frontend.spk2info, ModelFolder(self.model_dir).stored_speakers)

    def inference_sft(
        self,
        tts_text: Text,
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
        tts_text: Text,
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
        tts_text: Text,
        prompt_wav: Prompt,
        zero_shot_spk_id: str = "",
        stream: bool = False,
        speed: float = 1.0,
        text_frontend: bool = True,
    ) -> Speech:
        """Speak in the voice of a recording or of a stored prompt, in any language."""
        inputs = partial(self.frontend.frontend_cross_lingual, prompt_wav=prompt_wav, zero_shot_spk_id=zero_shot_spk_id)
        return self._speak(inputs, tts_text, text_frontend, stream, speed)

    def inference_vc(self, source_wav: Prompt, prompt_wav: Prompt, stream: bool = False, speed: float = 1.0) -> Speech:
        """Say what one recording says in the voice of another."""
        inputs = self.frontend.frontend_vc(source_wav, prompt_wav)
        yield from self.model.tts(**inputs, stream=stream, speed=speed)

    def _speak(
        self,
        inputs: Callable[[Any], dict[str, Tensor]],
        tts_text: Text,
        text_frontend: bool,
        stream: bool,
        speed: float,
    ) -> Speech:
        pieces = self._pieces(tts_text, text_frontend)
        if not pieces:
            if not tts_text.strip():
                raise InputError(nothing_to_speak(tts_text))
            logger.warning(nothing_to_speak(tts_text))
        for piece in pieces:
            yield from self.model.tts(**inputs(piece), stream=stream, speed=speed)

    def _pieces(self, tts_text: Text, text_frontend: bool) -> list[Any]:
        pieces = self.frontend.text_normalize(tts_text, split=True, text_frontend=text_frontend)
        return [piece for piece in pieces if not isinstance(piece, str) or has_words(piece)]

    def split(self, tts_text: str, text_frontend: bool = True) -> list[str]:
        """Return the pieces that a text is spoken in. Raises InputError if it has nothing to speak."""
        pieces = self._pieces(tts_text, text_frontend)
        if not pieces:
            raise InputError(nothing_to_speak(tts_text))
        return pieces

    def speak_together(
        self, pieces: Sequence[str], spk_id: str, draws: Sequence[Draws], speed: float = 1.0
    ) -> Iterator[Tensor]:
        """Yield the speech (1, samples) of each piece, spoken with a stored voice; this is faster than one by one.

        pieces: of `split`. draws: the source of each piece's random numbers. The language model finishes all pieces
        before the first speech is yielded.
        """
        check_speed(speed)
        inputs = [self.frontend.frontend_sft(piece, spk_id=spk_id) for piece in pieces]
        texts, embedding = [entry["text"] for entry in inputs], inputs[0]["llm_embedding"]
        yield from self.model.tts_together(texts, embedding, draws, speed)
