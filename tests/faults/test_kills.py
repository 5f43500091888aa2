"""Commands that are stopped at a random moment: run again, they end as if nothing had happened.

This takes minutes, so `make test` stops each command once and `make test-faults` often: FAULT_KILLS says how often.
"""

import os
import random
import shutil
import signal
from pathlib import Path

import pytest
from jobs import COMMANDS, Stage

KILLS = int(os.environ.get("FAULT_KILLS", "1"))
SIGNALS = (signal.SIGKILL, signal.SIGINT, signal.SIGTERM)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_that_was_stopped_ends_the_same_when_it_is_run_again(
    name: str, stages: dict[str, Stage], tmp_path: Path
) -> None:
    stage = stages[name]
    for number in range(KILLS):
        draw = random.Random(f"{name} {number}")
        folder = tmp_path / str(number)
        folder.mkdir()
        job = stage.before.copy(folder)
        job.stop(name, draw.uniform(0.2, 1) * stage.seconds, draw.choice(SIGNALS))
        job.run(name)
        assert job.result() == stage.result, f"stop {number}"
        left = [path for path in folder.rglob("*") if ".part" in path.name or path.name == ".unfinished"]
        assert not left, f"stop {number} leaves {left}"
        shutil.rmtree(folder)
    print(f"{name}: stopped {KILLS} times within {stage.seconds:.0f} s")
