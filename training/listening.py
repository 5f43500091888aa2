"""What training lets a user hear after each epoch."""

from dataclasses import dataclass
from pathlib import Path

from pytorch_lightning.loggers import TensorBoardLogger

from cosyvoice.model_folder.folder import ModelFolder
from cosyvoice.runtime.errors import InputError
from cosyvoice.utils.audio import read_wav
from utils import pick_device
from voices.choice import Voice
from voices.lines import Line
from voices.run import read_run
from voices.synthesis import load_voice
from voices.wav import speak_into_files


@dataclass
class Listener:
    """Lets each epoch's checkpoint speak a text, into a wav beside the logs and into TensorBoard."""

    text: str
    folder: ModelFolder
    device: str
    seed: int

    def listen(self, checkpoint: Path, epoch: int, logger: TensorBoardLogger) -> None:
        wav = Path(logger.log_dir) / f"epoch{epoch:04d}.wav"
        try:
            self.speak(checkpoint, wav)
        except (InputError, RuntimeError) as error:  # to hear nothing is no reason to stop training
            print(f"epoch {epoch} cannot be heard: {str(error).splitlines()[0]}")
            return
        speech, rate = read_wav(wav)
        logger.experiment.add_audio("listen", speech, epoch, rate)

    def speak(self, checkpoint: Path, wav: Path) -> None:
        """Write what `inference_joint.py --adapter CHECKPOINT --batch-size 1` with the same seed writes."""
        run = read_run(checkpoint)
        voice = load_voice(Voice.of_run(run), run.embedding, self.folder, pick_device(self.device))
        lines = [Line(1, self.text, wav)]
        for _ in speak_into_files(voice, lines, speed=1.0, seed=self.seed, together=1):
            pass
