"""The reader of cosyvoice.yaml: its dialect, its allow-list, and what it shares and leaves unbuilt."""

import functools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from parity import PARITY_DIR

from cosyvoice.model_folder.model_yaml import load_model_yaml, spelled
from cosyvoice.runtime.errors import InputError

Load = Callable[..., dict[str, Any]]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    def load_text(text: str, **options: Any) -> dict[str, Any]:
        path = tmp_path / "cosyvoice.yaml"
        path.write_text(text, encoding="utf-8")
        return load_model_yaml(path, **options)

    return load_text


def test_numbers_are_numbers(load: Load) -> None:
    values = load("a: 1e-06\nb: -2.5E3\nc: .5e+2\nd: 1e\ne: 1986\nf: null\ng: e10\n")
    assert values == {"a": 1e-06, "b": -2500.0, "c": 50.0, "d": "1e", "e": 1986, "f": None, "g": "e10"}
    assert isinstance(values["a"], float)


def test_references_calculate(load: Load) -> None:
    text = "a: 25\nb: 2\nc: !ref <a> * <b>\nd: !ref (<c> + 1) // 2 - <b>\ne: !ref <a> / 2\nf: !ref <d>\n"
    assert load(text, parts=("c", "d", "e", "f")) == {"c": 50, "d": 23, "e": 12.5, "f": 23}


def test_one_name_is_one_object(load: Load) -> None:
    text = """
width: 8
predictor: !new:cosyvoice.hifigan.f0_predictor.ConvRNNF0Predictor
    in_channels: !ref <width>
    cond_channels: !ref <width> * 2
again: [!ref <predictor>, !ref <predictor>]
"""
    parts = load(text, parts=("again", "predictor"))
    assert parts.keys() == {"again", "predictor"}
    assert parts["again"][0] is parts["again"][1] is parts["predictor"]
    assert parts["predictor"].classifier.in_features == 16


def test_name_makes_a_partial_function(load: Load) -> None:
    sampling = load("sampling: !name:cosyvoice.utils.common.ras_sampling\n    top_p: 0.5\n")["sampling"]
    assert isinstance(sampling, functools.partial)
    assert sampling.func.__name__ == "ras_sampling"
    assert sampling.keywords == {"top_p": 0.5}


def test_dictconfig_has_attributes_wherever_it_goes(load: Load) -> None:
    text = "params: !new:omegaconf.DictConfig\n    content:\n        sigma_min: 1e-06\nsame: [!ref <params>]\n"
    parts = load(text)
    assert parts["params"].sigma_min == 1e-06
    assert parts["same"][0] is parts["params"]


def test_plain_values_arrive_untouched(load: Load) -> None:
    # Hydra would call the first and look the second up, had it seen them.
    text = "conf:\n    optim: {_target_: os.getcwd, lr: 0.1}\n    name: ${oc.env:HOME}\n    none: null\n"
    expected = {"optim": {"_target_": "os.getcwd", "lr": 0.1}, "name": "${oc.env:HOME}", "none": None}
    assert load(text)["conf"] == expected


def test_defaults_are_for_what_the_file_leaves_out(load: Load) -> None:
    parts = load("rate: 3\n", parts=("rate", "split"), defaults={"rate": 4, "split": None})
    assert parts == {"rate": 3, "split": None}


def test_overrides_count_instead_of_the_files(load: Load) -> None:
    text = "folder: ''\nnames: [!ref <folder>]\n"
    assert load(text, overrides={"folder": "here"}) == {"folder": "here", "names": ["here"]}


def test_a_file_lies_beside_the_yaml(load: Load, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="words.txt does not exist, and cosyvoice.yaml needs it"):
        load("a: !file words.txt\n")
    (tmp_path / "words.txt").write_text("one")
    assert load("a: [!file words.txt]\nb: !ref <a>\n") == {"a": [tmp_path / "words.txt"], "b": [tmp_path / "words.txt"]}
    assert load("a: !file words.txt\nb: 1\n", parts=("b",)) == {"b": 1}
    (tmp_path / "inner").mkdir()
    for name in (tmp_path / "words.txt", "../words.txt", "inner/words.txt", "./words.txt", ".", "[words.txt]", "{}"):
        with pytest.raises(InputError, match="cannot be read"):
            load(f"a: !file {name}\n")
    for name in ("..", "", "inner"):
        with pytest.raises(InputError, match="does not exist"):
            load(f"a: !file {name}\n")


def test_files_count_by_their_content(load: Load, tmp_path: Path) -> None:
    text = "a: !name:cosyvoice.tokenizer.phones.get_phone_tokenizer\n    lexicon: !file words.txt\n"
    found = []
    for folder, content in (("one", "x"), ("two", "x"), ("three", "y")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "words.txt").write_text(content)
        (tmp_path / folder / "cosyvoice.yaml").write_text(text)
        found.append(spelled(load_model_yaml(tmp_path / folder / "cosyvoice.yaml")))
    assert found[0] == found[1] != found[2]


def test_seed_calls_are_ignored(load: Load) -> None:
    import random

    random.seed(7)
    state = random.getstate()
    assert load("__seed: !apply:random.seed [1986]\nrate: 3\n") == {"rate": 3}
    assert random.getstate() == state


def test_only_the_named_parts_are_imported() -> None:
    code = (
        "import sys; from pathlib import Path; from cosyvoice.model_folder.model_yaml import load_model_yaml;"
        f"load_model_yaml(Path({str(PARITY_DIR / 'tiny.yaml')!r}), parts=('sample_rate', 'train_conf'));"
        "print({'torch', 'hydra', 'whisper', 'cosyvoice.llm.llm'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"


@pytest.mark.parametrize(
    "target",
    [
        "!new:os.system [touch owned]",
        "!new:subprocess.Popen [touch owned]",
        "!name:builtins.eval",
        "!new:torch.load [x.pt]",
        "!name:torch.manual_seed",
        "!apply:os.system [touch owned]",
        "!apply:torch.hub.load [x]",
        "!new:cosyvoice.llm.llm.torch.load [x.pt]",
        "!new:cosyvoice.hifigan.discriminator.torch.load [x.pt]",
        "!new:cosyvoice.dataset.processor.__builtins__",
        "!!python/object/apply:os.system [touch owned]",
        "!include x.yaml",
        "!copy <a>",
    ],
)
def test_other_targets_are_refused(target: str, load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as caught:  # though nobody asked for that part
        load(f"a: 1\npart: {target}\n", parts=("a",))
    message = str(caught.value)
    assert "cosyvoice.yaml" in message and "\n" not in message
    assert target.split()[0].removeprefix("!!").split(":")[-1].lstrip("!") in message
    assert not (tmp_path / "owned").exists()


def test_what_an_open_module_imports_is_refused(load: Load) -> None:
    with pytest.raises(InputError, match="cosyvoice.dataset.processor.frame_count.* not allowed"):
        load("part: !name:cosyvoice.dataset.processor.frame_count\n")


def test_another_model_is_named(load: Load) -> None:
    with pytest.raises(InputError, match="CosyVoice3"):
        load("llm: !new:cosyvoice.llm.llm.CosyVoice3LM\n    speech_token_size: 6561\n")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1, 2", "cannot be read"),
        ("just text", "not a model configuration"),
        ("", "not a model configuration"),
        ("a: 1\na: 2\n", "'a' is given twice"),
        ("a: &x [1]\nb: *x\n", "aliases"),
        ("a: !ref <b>\nb: [!ref <a>]\n", "a -> b -> a"),
        ("a: !ref <missing>\n", "<missing>"),
        ("a: !ref <b> ** 9\nb: 9\n", "cannot evaluate"),
        ("a: !ref <b> * 2\nb: text\n", "b is not a number"),
        ("a: !ref <b> / 0\nb: 1\n", "cannot evaluate"),
        ("a: !ref __import__('os')\n", "cannot evaluate"),
        ("a: !new:omegaconf.DictConfig text\n", "takes a list or named values"),
        ("a: !new:cosyvoice.hifigan.f0_predictor.ConvRNNF0Predictor\n    colour: red\n", "colour"),
        ("a: " + "[" * 5000, "nested too deeply"),
        (
            "a0: 1\n" + "".join(f"a{i + 1}: !ref <a{i}>\n" for i in range(5000)) + "a: !ref <a5000>\n",
            "too deeply",
        ),
        ("a: \x00\n", "cannot be read"),
        ("a: !!bool maybe\n", "cannot be read"),
        ("? [1]\n: 2\na: 1\n", "cannot be read"),
    ],
)
def test_mistakes_are_one_line(text: str, message: str, load: Load) -> None:
    with pytest.raises(InputError) as caught:
        load(text, parts=("a",))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_missing_things_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nowhere.yaml does not exist"):
        load_model_yaml(tmp_path / "nowhere.yaml")
    with pytest.raises(InputError, match="no entry 'wings'"):
        load_model_yaml(PARITY_DIR / "tiny.yaml", parts=("wings",))
    (tmp_path / "latin.yaml").write_bytes("a: é".encode("latin-1"))
    with pytest.raises(InputError, match="latin.yaml cannot be read"):
        load_model_yaml(tmp_path / "latin.yaml")
