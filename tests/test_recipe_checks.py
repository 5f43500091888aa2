"""What is checked of a recipe's settings: contradictions end in one line before training starts."""

import re
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from parity import V2
from recipe import ROOT, TrainingRuns, write_config, write_corpus

from cosyvoice.bin import quiet_trainer, train
from cosyvoice.bin.recipe_checks import Pipeline, check_numbers
from cosyvoice.runtime.errors import InputError

EXAMPLES = ROOT / "examples"
MODELS = ("llm", "flow", "hifigan")
SMALL = {
    "mini": [EXAMPLES / "mini" / "cosyvoice.yaml"],
    "mini2": [EXAMPLES / "mini2" / "cosyvoice2.yaml", EXAMPLES / "mini2" / "training.yaml"],
    "tiny2": [V2.folder / "tiny2.yaml"],
}
LARGE = {
    "libritts": [EXAMPLES / "libritts" / "cosyvoice" / "conf" / "cosyvoice.yaml"],
    "libritts2": [EXAMPLES / "libritts" / "cosyvoice2" / "conf" / "cosyvoice2.yaml"],
}
MEL = "feat_extractor: !name:matcha.utils.audio.mel_spectrogram"
F0 = "compute_f0: !name:cosyvoice.dataset.processor.compute_f0"
RESAMPLE = "resample: !name:cosyvoice.dataset.processor.resample"
FBANK = "compute_fbank: !name:cosyvoice.dataset.processor.compute_fbank"
TRANSFORM = "mel_spec_transform1: !name:matcha.utils.audio.mel_spectrogram"


class Runs(TrainingRuns):
    """Runs of train.py that take one batch, and compute its losses."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.data, self.batches = folder, write_corpus(folder), 0
        self.config = write_config(folder)

    def one_batch(self, trainer: Any, model: Any, train_loader: Any, cv_loader: Any, last: Any) -> None:
        batch = next(iter(train_loader))
        assert model.validation_losses(batch)["loss"].isfinite()
        self.batches += 1

    def with_setting(self, entry: str, setting: str, value: object) -> Path:
        """Write the configuration with another setting of an entry, which is left out if the value is None."""
        text = self.config.read_text(encoding="utf-8")
        body = re.search(rf"(?m)^{re.escape(entry)}\n((?: +.*\n)+)", text)
        lines = re.sub(rf"(?m)^ +{setting}:.*\n", "", body[1])
        if value is not None:
            lines += f"    {setting}: {value}\n"
        return self.write(text.replace(body[0], f"{entry}\n{lines}"))

    def with_steps(self, name: str, *steps: str) -> Path:
        """Write the configuration with another data_pipeline, or data_pipeline_gan."""
        text = self.config.read_text(encoding="utf-8")
        listed = "".join(f"    !ref <{step}>,\n" for step in steps)
        text, count = re.subn(rf"(?m)^{name}: \[\n(?: +!ref.*\n)+\]", f"{name}: [\n{listed}]", text)
        assert count == 1
        return self.write(text)

    def write(self, text: str) -> Path:
        path = self.folder / "changed.yaml"
        path.write_text(text, encoding="utf-8")
        return path


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    found = Runs(tmp_path_factory.mktemp("recipe"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        patch.setattr(quiet_trainer, "fit_quietly", found.one_batch)
        yield found


@pytest.mark.parametrize("name", [*SMALL, *LARGE])
@pytest.mark.parametrize("model", MODELS)
def test_the_recipes_pass(name: str, model: str, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("".join(path.read_text(encoding="utf-8") for path in (SMALL | LARGE)[name]), encoding="utf-8")
    (tmp_path / "lexicon.txt.gz").touch()  # which the recipe of CosyVoice-mini makes
    args = Namespace(config=config, model=model, qwen_pretrain_path=None)
    recipe = train.read_recipe(args)
    check_numbers(train.own_or_common(args, recipe, "train_conf"))
    pipeline = Pipeline.of(train.own_or_common(args, recipe, "data_pipeline"))
    pipeline.check(model, *train.rates(args, recipe))
    if name in SMALL and model != "llm":
        pipeline.check_model(model, train.built(args, recipe, model))


@pytest.mark.parametrize(
    ("model", "entry", "setting", "value", "message"),
    [
        ("hifigan", "truncate: !name:cosyvoice.dataset.processor.truncate", "truncate_length", 3000,
         "truncate_length 3000 is not a multiple of 256, the hop_size of feat_extractor. Give 3072, for example"),
        ("hifigan", "truncate: !name:cosyvoice.dataset.processor.truncate", "truncate_length", 256,
         "feat_extractor cannot transform 256 samples .* give a larger truncate_length"),
        ("hifigan", "truncate: !name:cosyvoice.dataset.processor.truncate", "truncate_length", 0,
         "truncate_length is 0; it must be at least 1"),
        ("hifigan", F0, "hop_size", 128, "hop_size of feat_extractor is 256, hop_size of compute_f0 is 128"),
        ("hifigan", F0, "hop_size", None, "compute_f0: missing a required argument: 'hop_size'"),
        ("hifigan", F0, "sample_rate", 16000, "sampling_rate of feat_extractor is 22050, .*compute_f0 is 16000|"
         "compute_f0 is 16000, sampling_rate of feat_extractor is 22050"),
        ("hifigan", TRANSFORM, "sampling_rate", 24000, "sampling_rate of mel_spec_transform 1 is 24000"),
        ("hifigan", TRANSFORM, "win_size", 4096, "hifigan cannot compare windows of 3072 samples .*win_length=4096"),
        ("flow", RESAMPLE, "resample_rate", 16000, "resample_rate of resample is 16000, .*sample_rate is 22050"),
        ("flow", RESAMPLE, "resample_rate", None, "resample: missing a required argument: 'resample_rate'"),
        ("flow", RESAMPLE, "resample_rate", 0, "resample_rate is 0; it must be at least 1"),
        ("flow", MEL, "fmin", None, "mel_spectrogram: missing a required argument: 'fmin'"),
        ("flow", MEL, "hop_size", None, "mel_spectrogram: missing a required argument: 'hop_size'"),
        ("flow", MEL, "win_size", 2048, "feat_extractor cannot transform .* win_length <= n_fft"),
        ("flow", MEL, "num_mels", 40, "feat_extractor makes 40 bins and 43 frames from 11008 samples, not 80 and 43"),
        ("flow", MEL, "fmax", 0, "feat_extractor makes a mel that holds no numbers. Correct its fmin and fmax"),
        ("hifigan", TRANSFORM, "fmax", 0, "a loss of hifigan is no number. Correct fmin and fmax of its mel_spec"),
        ("flow", MEL, "num_mels", 10**6, "num_mels is 1000000, which no model has"),
        ("flow", MEL, "center", True, "feat_extractor makes 80 bins and 47 frames from 11008 samples, not 80 and 43"),
        ("flow", MEL, "hop_size", 128, "the flow makes 1722 mel frames of 1000 speech tokens, and feat_extractor 3445"),
        ("flow", FBANK, "num_frames", 960, "num_frames of compute_fbank is 960, .* 441 samples at 50 tokens a second"),
    ],
)  # fmt: skip
def test_contradictions_are_named(
    model: str, entry: str, setting: str, value: object, message: str, runs: Runs
) -> None:
    config, before = runs.with_setting(entry, setting, value), runs.batches
    with pytest.raises(InputError, match=message) as caught:
        runs.train(model, "refused", config=config)
    assert str(caught.value).startswith(f"{config}: ") and "\n" not in str(caught.value)
    assert runs.batches == before


def test_a_mel_for_another_vocoder_is_named(runs: Runs) -> None:
    text = runs.with_setting(MEL, "hop_size", 128).read_text().replace("hop_size: 256", "hop_size: 128")
    with pytest.raises(InputError, match="the vocoder makes 256 samples of a mel frame, and hop_size .* is 128"):
        runs.train("hifigan", "refused", config=runs.write(text))


def test_tokens_of_another_duration_are_named_for_every_model(tmp_path: Path) -> None:
    """Without the flow, token_frame_rate tells how long a token lasts."""
    text = (V2.folder / "tiny2.yaml").read_text(encoding="utf-8").replace("num_frames: 960", "num_frames: 1920")
    (tmp_path / "config.yaml").write_text(text, encoding="utf-8")
    args = Namespace(config=tmp_path / "config.yaml", model="llm", qwen_pretrain_path=None)
    recipe = train.read_recipe(args)
    pipeline = Pipeline.of(train.own_or_common(args, recipe, "data_pipeline"))
    with pytest.raises(InputError, match="num_frames of compute_fbank is 1920, .* 960 samples at 25 tokens a second"):
        pipeline.check("llm", *train.rates(args, recipe))


START = ("parquet_opener", "tokenize", "filter", "resample")
END = ("parse_embedding", "batch", "padding")


@pytest.mark.parametrize(
    ("model", "name", "steps", "message"),
    [
        ("flow", "data_pipeline", (), "does not end in batch and padding"),
        ("flow", "data_pipeline", (*START, "compute_fbank", *END, "sort"), "does not end in batch and padding"),
        ("flow", "data_pipeline", (*START, *END), "no compute_fbank before batch"),
        ("flow", "data_pipeline", (*START[1:], "compute_fbank", *END), "no parquet_opener before tokenize"),
        ("llm", "data_pipeline", (*START[:2], "compute_fbank", *END), "no filter before compute_fbank"),
        ("llm", "data_pipeline", (*START, "batch", "padding"), "no parse_embedding before batch"),
        ("llm", "data_pipeline", (*START, "feat_extractor", *END), "not a list of steps"),
        ("llm", "data_pipeline", (*START, "sample_rate", *END), "not a list of steps"),
        ("hifigan", "data_pipeline_gan", (*START, "compute_fbank", "compute_f0", *END), "no truncate before"),
        ("hifigan", "data_pipeline_gan", (*START, "compute_fbank", "truncate", "compute_f0", *END), "no truncate"),
        ("hifigan", "data_pipeline_gan", (*START, "truncate", "compute_fbank", *END), "no compute_f0 before batch"),
    ],
)
def test_steps_that_are_missing_or_too_late_are_named(
    model: str, name: str, steps: tuple[str, ...], message: str, runs: Runs
) -> None:
    with pytest.raises(InputError, match=message):
        runs.train(model, "refused", config=runs.with_steps(name, *steps))


@pytest.mark.parametrize("value", ["5", "text", "[1]", "null"])
def test_what_is_no_pipeline_is_named(value: str, runs: Runs) -> None:
    text = runs.config.read_text(encoding="utf-8").replace("data_pipeline: [", f"data_pipeline: {value}\nunused: [")
    with pytest.raises(InputError, match="not a list of steps"):
        runs.train("flow", "refused", config=runs.write(text))


NUMBERS = [
    ("truncate: !name:cosyvoice.dataset.processor.truncate", "truncate_length"),
    (RESAMPLE, "resample_rate"),
    *[(MEL, name) for name in ("n_fft", "num_mels", "sampling_rate", "hop_size", "win_size", "fmin", "fmax", "center")],
    *[(TRANSFORM, name) for name in ("n_fft", "hop_size", "win_size", "num_mels")],
    (F0, "sample_rate"),
    (F0, "hop_size"),
    ("batch: !name:cosyvoice.dataset.processor.batch", "max_frames_in_batch"),
]


@pytest.mark.parametrize(("entry", "setting"), NUMBERS, ids=lambda part: part.partition(":")[0])
@pytest.mark.parametrize("value", [None, 0, 1, 255, 512, 4096, 24000, 10**6])
def test_every_number_is_used_or_refused_before_training(
    entry: str, setting: str, value: int | None, runs: Runs
) -> None:
    before = runs.batches
    try:
        runs.train("hifigan", "any", config=runs.with_setting(entry, setting, value))
    except InputError as error:
        assert "changed.yaml" in str(error) and "\n" not in str(error)
    else:
        assert runs.batches == before + 1
