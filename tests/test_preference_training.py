"""`train.py` with a CosyVoice2: preferences, the text model's weights, two processes, and what is refused."""

import json
import multiprocessing
import socket
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import yaml
from parity import V2
from recipe import TrainingRuns, train_as, write_config, write_corpus

from cosyvoice.bin import train
from cosyvoice.bin.preference_model import PreferenceModel
from cosyvoice.bin.recipe_checkpoints import LAST
from cosyvoice.llm.qwen2_lm import Qwen2LM
from cosyvoice.model_folder.folder import ModelFolder
from cosyvoice.model_folder.weights import read_state_dict
from cosyvoice.runtime.errors import InputError
from tools.random_model import make_random_model


class Recipe(TrainingRuns):
    """Runs of train.py on one corpus, from the weights of a small CosyVoice2."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = ModelFolder(make_random_model(folder / "model", 1, "small2"))
        self.config = self.configure("config.yaml")
        (folder / "corpus").mkdir()
        # long enough to pass the filter, with few enough letters that text and speech take turns in some clips
        self.data = write_corpus(folder / "corpus", seconds=1.2, token_rate=25, letters=8, dpo=True)

    def configure(self, name: str, **settings: object) -> Path:
        return write_config(self.folder, name, self.model.yaml, **settings)

    def options(self, part: str, run: str, *options: str, config: Path | None = None) -> list[str]:
        text_model = "--qwen_pretrain_path", str(self.model.text_model)
        return super().options(part, run, *text_model, *options, config=config)

    def prefer(self, run: str, *options: str) -> Path:
        return self.train("llm", run, "--dpo", "--ref_model", str(self.model.weights("llm")), *options)


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    return Recipe(tmp_path_factory.mktemp("recipe2"))


def losses(folder: Path, epoch: int) -> dict[str, float]:
    return yaml.safe_load((folder / f"epoch_{epoch}_whole.yaml").read_text())["loss_dict"]


def assert_same_weights(one: Path, other: Path, atol: float = 0.0) -> None:
    first, second = read_state_dict(one), read_state_dict(other)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, rtol=0, atol=atol, msg=name)


def test_recorded_speech_comes_to_be_preferred(recipe: Recipe) -> None:
    """Without --checkpoint the llm starts from the reference, so nothing is preferred at first."""
    folder = recipe.prefer("preferred")
    assert_same_weights(recipe.model.weights("llm"), folder / "init.pt")
    assert 0 < losses(folder, 0)["reward_margin"] < losses(folder, 1)["reward_margin"]
    assert 0.5 < losses(folder, 1)["dpo_acc"] <= 1
    for epoch in range(2):
        found = losses(folder, epoch)
        assert found["loss"] == pytest.approx(found["sft_loss"] + found["dpo_loss"])
        assert found["reward_margin"] == pytest.approx(found["chosen_reward"] - found["reject_reward"], rel=1e-3)
    names = torch.load(folder / LAST, weights_only=True)["state_dict"].keys()
    assert {name.partition(".")[0] for name in names} == {"part"}  # the reference is kept in its own file


def test_resumed_preferences_equal_uninterrupted_ones(recipe: Recipe) -> None:
    whole = recipe.folder / "preferred"
    whole = whole if whole.exists() else recipe.prefer("preferred")
    recipe.prefer("resumed", "--max_epoch", "1")
    with pytest.raises(InputError, match="ref_model .*; give the same to resume"):
        recipe.train("llm", "resumed", "--resume", "auto")
    assert_same_weights(whole / "epoch_1_whole.pt", recipe.prefer("resumed", "--resume", "auto") / "epoch_1_whole.pt")


def test_the_four_probabilities_have_one_layout(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """An llm that is its own reference gives no reward, whatever is drawn."""
    args = train.parse(recipe.options("llm", "unused", "--dpo", "--ref_model", str(recipe.model.weights("llm"))))
    entries = train.read_recipe(args)
    steps, conf = (train.own_or_common(args, entries, name) for name in ("data_pipeline", "train_conf"))
    model: PreferenceModel = train.build_model(args, entries, conf)
    batches = list(train.build_loaders(args, steps)[0])
    seen: list[list[bool]] = []
    join = Qwen2LM.join
    spied = lambda llm, batch, device: seen.append(batch["bistream"].tolist()) or join(llm, batch, device)  # noqa: E731
    monkeypatch.setattr(Qwen2LM, "join", spied)
    for batch in batches:
        found = model.losses(batch)
        assert found["chosen_reward"] == 0 and found["reject_reward"] == 0
    for policy, reference in zip(seen[::2], seen[1::2], strict=True):
        count = len(policy) // 2
        assert policy == reference and policy[:count] == policy[count:]
    drawn = {layout for layouts in seen for layout in layouts}
    assert drawn == {True, False}


def test_two_processes_equal_one_with_twice_the_accumulation(recipe: Recipe) -> None:
    """The one process has two workers, whose batches it takes in turn: those of the two processes."""
    one = recipe.train("llm", "one_process", "--num_workers", "2")
    argv = recipe.options("llm", "two_processes", config=recipe.configure("unaccumulated.yaml", accum_grad=1))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    slow = ["pytorch_lightning", "transformers", "torchaudio.transforms", "hydra.utils", "pyarrow.parquet"]
    multiprocessing.set_forkserver_preload(slow)  # imported once for both
    torch.multiprocessing.start_processes(train_as, args=(2, port, argv), nprocs=2, start_method="forkserver")
    two = recipe.folder / "two_processes"
    for epoch in range(2):
        assert losses(two, epoch) == pytest.approx(losses(one, epoch), rel=1e-5)
    assert_same_weights(one / "epoch_1_whole.pt", two / "epoch_1_whole.pt", atol=1e-5)


def test_an_llm_from_scratch_starts_from_the_text_model(
    recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = train.parse(recipe.options("llm", "unused"))
    conf = train.own_or_common(args, train.read_recipe(args), "train_conf")
    model = train.build_model(args, train.read_recipe(args), conf).part.llm.model
    assert "has no model.safetensors: the text model starts from random weights" in capsys.readouterr().err

    text_model = tmp_path / "CosyVoice-BlankEN"
    text_model.mkdir()
    for file in recipe.model.text_model.iterdir():
        (text_model / file.name).write_bytes(file.read_bytes())
    given = {name: torch.randn_like(tensor).bfloat16() for name, tensor in model.state_dict().items()}
    del given["lm_head.weight"]  # as published: it is the embedding
    safetensors.torch.save_file(given, text_model / "model.safetensors")
    args.qwen_pretrain_path = text_model
    started = train.build_model(args, train.read_recipe(args), conf).part.llm.model.state_dict()
    given["lm_head.weight"] = given["model.embed_tokens.weight"]
    assert all(torch.equal(started[name], tensor.float()) for name, tensor in given.items())

    config = json.loads((text_model / "config.json").read_text())
    (text_model / "config.json").write_text(json.dumps(config | {"intermediate_size": 32}))
    with pytest.raises(InputError, match="model.safetensors does not fit this model"):
        train.build_model(args, train.read_recipe(args), conf)
    (text_model / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(InputError, match="model.safetensors cannot be read"):
        train.build_model(args, train.read_recipe(args), conf)


def test_mistakes_are_said_before_training(recipe: Recipe, tmp_path: Path) -> None:
    weights = str(recipe.model.weights("llm"))
    other = str(V2.folder / "tiny2_llm.pt")
    with pytest.raises(InputError, match="tiny2_llm.pt does not fit this model: .* of another shape"):
        recipe.train("llm", "other_size", "--dpo", "--ref_model", other, "--checkpoint", weights)
    with pytest.raises(InputError, match="Give its weights with --ref_model"):
        recipe.train("llm", "no_reference", "--dpo")
    with pytest.raises(InputError, match="--ref_model belongs to --dpo"):
        recipe.train("llm", "no_dpo", "--ref_model", weights)
    with pytest.raises(InputError, match="--dpo teaches the llm alone. Train the flow without it"):
        recipe.train("flow", "flow", "--dpo", "--ref_model", weights)
    gone = tmp_path / "gone.list"
    gone.write_text(f"{recipe.data.read_text()}elsewhere/parquet_000000009.tar\n")
    for lists in (["--train_data", str(gone)], ["--cv_data", str(gone)]):
        with pytest.raises(InputError, match="gone.list lists elsewhere/parquet_000000009.tar, which does not exist"):
            recipe.train("llm", "gone", *lists)
    plain = tmp_path / "plain"
    plain.mkdir()
    unpaired = str(write_corpus(plain, seconds=1.2, token_rate=25))
    with pytest.raises(InputError, match="has no column reject_speech_token"):
        recipe.prefer("unpaired", "--train_data", unpaired)


def test_settings_of_preferences(recipe: Recipe) -> None:
    def model(**conf: Any) -> PreferenceModel:
        args = train.parse(recipe.options("llm", "unused", "--dpo", "--ref_model", str(recipe.model.weights("llm"))))
        entries = train.read_recipe(args)
        return train.build_model(args, entries, train.own_or_common(args, entries, "train_conf") | conf)

    assert model(dpo_conf={"beta": 0.2}).preference.beta == 0.2
    with pytest.raises(InputError, match="dpo_conf: .*bata"):
        model(dpo_conf={"bata": 0.2})


def test_a_configuration_without_preferences_is_refused(recipe: Recipe) -> None:
    v1 = ModelFolder(make_random_model(recipe.folder / "v1", 1, "small"))
    options = ["--dpo", "--ref_model", str(v1.weights("llm"))]
    argv = recipe.options("llm", "v1_run", *options, config=v1.yaml)
    with pytest.raises(InputError, match="has no entry qwen_pretrain_path. Leave --qwen_pretrain_path out"):
        train.main(argv)
    at = argv.index("--qwen_pretrain_path")
    with pytest.raises(InputError, match="TransformerLM does not learn preferences"):
        train.main(argv[:at] + argv[at + 2 :])
