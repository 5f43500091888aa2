"""The public API: a model folder in, speech out. Names and signatures are upstream's."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from cosyvoice.cli.base import FolderVoice, Speech, Text
from cosyvoice.cli.cosyvoice2_frontend import CosyVoice2FrontEnd
from cosyvoice.cli.frontend import CosyVoiceFrontEnd, Prompt
from cosyvoice.cli.model import CosyVoice2Model, CosyVoiceModel
from cosyvoice.cli.speech_model import Weights
from cosyvoice.model_folder.folder import COSYVOICE2, COSYVOICE_300M, ModelFolder, as_folder
from cosyvoice.runtime.errors import InputError


class CosyVoice(FolderVoice):
    """Speaks with a CosyVoice-300M, -SFT or -Instruct folder. For what all modes yield see FolderVoice.

    A stream yields about every 2 seconds of speech.

    Args:
        model_dir: folder with cosyvoice.yaml, llm.pt, flow.pt, hift.pt, the two .onnx files, maybe spk2info.pt
        load_jit, load_trt, load_vllm: upstream's accelerators, which are not supported here: a warning says so
        trt_concurrent: belongs to load_trt
        fp16: on a GPU the same as precision="float16"; changes nothing on a CPU
        device: where to compute, e.g. "cpu"; by default a GPU where one can compute
        weights: files or tensors by name to load, or a module to use as it is, in place of the folder's own, by part:
            "llm", "flow", "hift"
        precision: of language model and flow. "float32" is exact. On a GPU "float16" keeps both in half precision. On a
            CPU "float16" (of the language model alone), "bfloat16" (where the processor has it) and "int8" are faster
    """

    generation = COSYVOICE_300M
    model_class = CosyVoiceModel
    frontend_class = CosyVoiceFrontEnd

    def __init__(
        self,
        model_dir: str | Path | ModelFolder,
        load_jit: bool = False,
        load_trt: bool = False,
        fp16: bool = False,
        trt_concurrent: int = 1,
        *,
        load_vllm: bool = False,
        device: str | None = None,
        weights: Mapping[str, Weights] | None = None,
        precision: str = "float32",
    ) -> None:
        accelerators = {"load_jit": load_jit, "load_trt": load_trt, "load_vllm": load_vllm}
        super().__init__(model_dir, accelerators, fp16, device, weights, precision)

    def inference_instruct(
        self,
        tts_text: Text,
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


class CosyVoice2(FolderVoice):
    """Speaks with a CosyVoice2-0.5B folder. For what all modes yield see FolderVoice.

    A stream's first chunk is there after 28 tokens (1 second of speech) or, with a prompt, up to 24 more; later ones
    are longer. A text may also be an iterator of texts, as a chat model writes them: speech begins before its end.

    Args:
        model_dir: folder with cosyvoice2.yaml, llm.pt, flow.pt, hift.pt, CosyVoice-BlankEN, the two .onnx files, maybe
            spk2info.pt
        others: as in CosyVoice
    """

    generation = COSYVOICE2
    model_class = CosyVoice2Model
    frontend_class = CosyVoice2FrontEnd

    def __init__(
        self,
        model_dir: str | Path | ModelFolder,
        load_jit: bool = False,
        load_trt: bool = False,
        load_vllm: bool = False,
        fp16: bool = False,
        trt_concurrent: int = 1,
        *,
        device: str | None = None,
        weights: Mapping[str, Weights] | None = None,
        precision: str = "float32",
    ) -> None:
        accelerators = {"load_jit": load_jit, "load_trt": load_trt, "load_vllm": load_vllm}
        super().__init__(model_dir, accelerators, fp16, device, weights, precision)

    def inference_instruct(self, *_: Any, **_options: Any) -> NoReturn:
        """Raise InputError: instructions need a prompt here."""
        raise InputError("CosyVoice2 follows instructions with a prompt or a stored one; use inference_instruct2")

    def inference_instruct2(
        self,
        tts_text: Text,
        instruct_text: str,
        prompt_wav: Prompt,
        zero_shot_spk_id: str = "",
        stream: bool = False,
        speed: float = 1.0,
        text_frontend: bool = True,
    ) -> Speech:
        """Speak in the voice of a recording or of a stored prompt, in the manner that `instruct_text` describes."""
        instruct_text = self.frontend.text_normalize(instruct_text, split=False, text_frontend=text_frontend)
        inputs = partial(
            self.frontend.frontend_instruct2,
            instruct_text=instruct_text,
            prompt_wav=prompt_wav,
            zero_shot_spk_id=zero_shot_spk_id,
        )
        return self._speak(inputs, tts_text, text_frontend, stream, speed)


class CosyVoice3:
    """Stands for Fun-CosyVoice3, which is not implemented."""

    def __init__(self, *_: Any, **_options: Any) -> None:
        raise InputError(
            "CosyVoice3 cannot speak here yet: its flow (a diffusion transformer), vocoder and speech tokenizer are "
            "missing; use CosyVoice2-0.5B or CosyVoice-300M"
        )


KINDS = (CosyVoice, CosyVoice2)


def kind_of(folder: ModelFolder) -> type[FolderVoice]:
    """Return the class that the folder's YAML belongs to."""
    return next(kind for kind in KINDS if kind.generation is folder.generation)


def AutoModel(model_dir: str | Path | ModelFolder, **options: Any) -> FolderVoice:
    """Return the model of a folder, of the class that its YAML belongs to. options: those of that class."""
    folder = as_folder(model_dir)
    return kind_of(folder)(folder, **options)
