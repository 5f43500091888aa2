"""The layers of DESIGN: who may import whom, and what stays out of which import."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = ("prepare_joint_data", "train_joint", "merge_joint_weights", "inference_joint")
RECIPE_SCRIPTS = (
    "tools/extract_embedding",
    "tools/extract_speech_token",
    "tools/make_parquet_list",
    "cosyvoice/bin/train",
    "cosyvoice/bin/average_model",
    "cosyvoice/bin/export_jit",
    "cosyvoice/bin/export_onnx",
    "examples/libritts/cosyvoice/local/prepare_data",
    "examples/libritts/cosyvoice2/local/prepare_reject_sample",
    "examples/sft/local/make_config",
    "examples/sft/local/train",
    "examples/sft/local/write_speaker",
    "examples/mini/make_corpus",
    "examples/mini/make_lexicon",
    "examples/mini/align_text",
    "examples/mini/train_tokenizer",
    "examples/mini/make_speaker_encoder",
    "examples/mini/make_flow_start",
    "examples/mini/make_prompts",
    "examples/mini/make_model_dir",
    "examples/mini/voice_folders",
    "examples/mini/resynthesise",
    "examples/mini2/make_text_model",
    "examples/mini2/train_text_model",
)
BENCHES = tuple(
    f"bench/{name}" for name in ("decode", "synthesis", "train_steps", "operations", "preparation", "start_up")
)
# Each layer imports only from those after it; modules of one layer may use each other, scripts may not.
SUITE_LAYERS = (
    SCRIPTS,
    ("training",),
    ("llm_flow_model",),
    ("clips", "voices"),
    ("dataset",),
    ("lora", "utils", "config"),
    ("cosyvoice",),
    ("matcha",),
)
COSYVOICE_LAYERS = (
    ("bin",),
    ("cli",),
    ("llm", "flow", "hifigan", "dataset"),
    ("transformer", "tokenizer", "speech_encoders", "text"),
    ("model_folder",),
    ("utils",),
    ("runtime",),
)
LIGHTNING_PLACES = ("llm_flow_model.py", "train_joint.py", "training/", "cosyvoice/bin")
PACKAGES = {  # import name -> package
    "yaml": "PyYAML",
    "whisper": "openai-whisper",
    "hydra": "hydra-core",
    "PIL": "pillow",
    "resemblyzer": "Resemblyzer",
}
NOT_IMPORTED_HERE = {"tensorboard"}  # but by Lightning's logger
CLUSTER = {"ray"}  # of --engine ray
JUDGES = {"ctranslate2", "hama", "matplotlib", "Resemblyzer", "speechmos"}  # of tools/evaluate.py, beyond the suite


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


SUITE_FOLDERS = ("clips", "training", "voices")
SUITE_FILES = sorted(ROOT.glob("*.py")) + sources(*SUITE_FOLDERS)
PACKAGE_FILES = sources("cosyvoice", "matcha")


def imports(path: Path) -> Iterator[str]:
    """Full names of all modules that the file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def layer_of(name: str, layers: tuple[tuple[str, ...], ...]) -> int | None:
    return next((number for number, layer in enumerate(layers) if name in layer), None)


def top_name(path: Path) -> str:
    """Return the name that an import of the file begins with."""
    return path.relative_to(ROOT).with_suffix("").parts[0]


def identifier(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", SUITE_FILES, ids=identifier)
def test_the_suite_imports_downwards(path: Path) -> None:
    room = top_name(path)
    own = layer_of(room, SUITE_LAYERS)
    assert own is not None, f"{path.name} has no layer"
    for module in imports(path):
        other = layer_of(module.partition(".")[0], SUITE_LAYERS)
        assert other is None or other > own or (other == own and room not in SCRIPTS), module


@pytest.mark.parametrize("path", PACKAGE_FILES, ids=identifier)
def test_packages_import_downwards(path: Path) -> None:
    suite = set(map(top_name, SUITE_FILES)) | {"tools", "tests", "bench"}
    package, *inner = path.relative_to(ROOT).with_suffix("").parts
    for module in imports(path):
        top, *rest = module.split(".")
        assert top not in suite, module
        assert not (package == "matcha" and top == "cosyvoice"), module
        if package == top == "cosyvoice" and len(inner) > 1:
            own, other = layer_of(inner[0], COSYVOICE_LAYERS), layer_of(rest[0], COSYVOICE_LAYERS)
            assert own is not None and other is not None, f"{module} has no layer"
            assert rest[0] == inner[0] or other > own, module


@pytest.mark.parametrize("path", [*SUITE_FILES, *PACKAGE_FILES], ids=identifier)
def test_lightning_stays_in_the_training_modules(path: Path) -> None:
    if not identifier(path).startswith(LIGHTNING_PLACES):
        assert not [module for module in imports(path) if module.startswith(("pytorch_lightning", "lightning"))]


def test_init_files_are_empty() -> None:
    all_files = [*PACKAGE_FILES, *sources(*SUITE_FOLDERS)]
    for path in all_files:
        if path.name == "__init__.py":
            assert path.read_bytes() == b"", path
    folders = {path.parent for path in all_files}
    assert all((folder / "__init__.py").is_file() for folder in folders)


def packages(files: list[Path]) -> set[str]:
    """What the files import that is neither the project's nor Python's."""
    own = set(map(top_name, SUITE_FILES)) | {path.stem for path in sources("tests", "bench")}
    own |= {"cosyvoice", "matcha", "tools", "examples"}
    modules = {module.partition(".")[0] for path in files for module in imports(path)}
    return {PACKAGES.get(module, module).replace("_", "-") for module in modules - own - sys.stdlib_module_names}


def test_requirements_are_what_the_code_imports() -> None:
    needed = packages([*SUITE_FILES, *PACKAGE_FILES, *sources("tests", "tools", "bench")])
    assert set(pins("requirements.txt")) == needed - JUDGES - CLUSTER | NOT_IMPORTED_HERE


def test_judges_are_needed_by_the_tools_alone() -> None:
    assert packages(sources("tools")) >= JUDGES
    assert not packages([*SUITE_FILES, *PACKAGE_FILES, *sources("tests", "bench")]) & JUDGES
    judges = pins("requirements-eval.txt").keys()
    assert judges >= JUDGES
    assert not judges & pins("constraints.txt").keys(), "it is installed anyway"


def test_a_cluster_is_needed_by_its_engine_alone() -> None:
    engine = ROOT / "tools" / "ray_engine.py"
    assert packages([engine]) >= CLUSTER and pins("requirements-cluster.txt").keys() == CLUSTER
    others = [path for path in [*SUITE_FILES, *PACKAGE_FILES, *sources("tools", "bench")] if path != engine]
    assert not packages(others) & CLUSTER


def test_constraints_pin_the_same_versions() -> None:
    constraints = pins("constraints.txt")
    assert pins("requirements.txt").items() <= constraints.items()


def pins(name: str) -> dict[str, str]:
    """{package: version}; every line that is not a comment must pin exactly."""
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    found = [re.fullmatch(r"([\w.-]+)==([\w.]+)", line) for line in lines if not line.startswith("#")]
    assert all(found), f"{name} holds a line that pins nothing"
    return {pin[1]: pin[2] for pin in found}


@pytest.mark.parametrize("script", [*SCRIPTS, "tools/random_model", "tools/evaluate", *RECIPE_SCRIPTS, *BENCHES])
def test_help_needs_no_path_and_no_heavy_import(script: str, tmp_path: Path) -> None:
    code = (
        "import runpy, sys\n"
        "class Blocked:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name in ('torch', 'numpy', 'pyarrow', 'onnxruntime', 'pytorch_lightning', 'whisper', 'hydra'):\n"
        "            raise AssertionError(f'--help imports {name}')\n"
        "sys.meta_path.insert(0, Blocked())\n"
        f"sys.argv = ['{script}.py', '--help']\n"
        f"sys.path[0] = {str((ROOT / script).parent)!r}\n"  # all that Python itself adds
        f"runpy.run_path({str(ROOT / script)!r} + '.py', run_name='__main__')\n"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "usage:" in result.stdout
