"""Commands that are stopped at a random moment: run again, they end as if nothing had happened.

This takes minutes, so `make test` stops each command once and `make test-faults` often: FAULT_KILLS says how often.
"""

import os
import random
import shutil
import signal
from pathlib import Path

import pytest
from jobs import COMMANDS, Job, new_job

KILLS = int(os.environ.get("FAULT_KILLS", "1"))
SIGNALS = (signal.SIGKILL, signal.SIGINT, signal.SIGTERM)
@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Job, float, dict[str, str]]]:
    """Of each command: the job just before it, the seconds that it takes, and what is there after it."""
    job = new_job(tmp_path_factory.mktemp("job"))
    found = {}
    for name in COMMANDS:
        before = job.copy(tmp_path_factory.mktemp(f"before_{name}"))
        found[name] = before, job.run(name), job.result()
    return found


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_that_was_stopped_ends_the_same_when_it_is_run_again(
    name: str, stages: dict[str, tuple[Job, float, dict[str, str]]], tmp_path: Path
) -> None:
    before, seconds, expected = stages[name]
    for number in range(KILLS):
        draw = random.Random(f"{name} {number}")
        folder = tmp_path / str(number)
        folder.mkdir()
        job = before.copy(folder)
        job.stop(name, draw.uniform(0.2, 1) * seconds, draw.choice(SIGNALS))
        job.run(name)
        assert job.result() == expected, f"stop {number}"
        left = [path for path in folder.rglob("*") if ".part" in path.name or path.name == ".unfinished"]
        assert not left, f"stop {number} leaves {left}"
        shutil.rmtree(folder)
    print(f"{name}: stopped {KILLS} times within {seconds:.0f} s")
