"""One job, run once for all tests of this folder."""

import pytest
from jobs import COMMANDS, Job, Stage, new_job


@pytest.fixture(scope="session")
def stages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Stage]:
    """Each command's stage, in their order."""
    job, found = new_job(tmp_path_factory.mktemp("job")), {}
    for name in COMMANDS:
        before = job.copy(tmp_path_factory.mktemp(f"before_{name}"))
        found[name] = Stage(job, before, job.run(name), job.result())
    return found


@pytest.fixture(scope="session")
def finished(stages: dict[str, Stage]) -> Job:
    """A job whose commands have all been run."""
    return stages["speak"].job
