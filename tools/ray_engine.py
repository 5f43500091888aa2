"""Work on a Ray cluster, whose machines share the folders of the program and of the data."""

import os
import socket
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cosyvoice.runtime.errors import InputError
from tools.engines import Spread
from utils import in_order

if TYPE_CHECKING:
    import ray

ROOT = Path(__file__).resolve().parents[1]


@contextmanager
def on_ray(workers: int) -> Iterator[Spread]:
    """Yield a `spread` over the cores of the cluster at RAY_ADDRESS, or over `workers` processes of this machine.

    Raises InputError where Ray is not installed or the cluster does not answer.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # read when ray is imported
    try:
        import ray
    except ModuleNotFoundError as error:
        remedy = "pip install -r requirements-cluster.txt"
        raise InputError(f"--engine ray: Ray is not installed ({error}); {remedy}") from error

    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        try:
            check_reachable()
            ray.init(**where(workers, folder), log_to_driver=False, logging_level="ERROR")
        except Exception as error:  # what Ray raises where its own processes do not start has no other class
            address = os.environ.get("RAY_ADDRESS", "this machine")
            raise InputError(f"no Ray cluster at {address} ({first_line(error)}); see docs/recipes.md") from error
        try:
            cores = int(ray.cluster_resources().get("CPU", 0))
            if not cores:
                raise InputError("the Ray cluster has no core; start machines that have some (ray start --num-cpus)")
            print(f"ray: {cores} cores on {len(ray.nodes())} machine(s)", file=sys.stderr)

            def spread(work: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
                return in_order(remote_job(work), result, items, cores)

            yield spread
        finally:
            ray.shutdown()


def check_reachable() -> None:
    """Raise OSError where nothing listens at the host and port of RAY_ADDRESS, for which Ray would wait for minutes."""
    host, colon, port = os.environ.get("RAY_ADDRESS", "").rpartition("://")[2].rpartition(":")
    if colon and port.isdecimal():
        socket.create_connection((host, int(port)), timeout=10).close()


def where(workers: int, folder: str) -> dict[str, Any]:
    """Return the arguments of `ray.init` that name the cluster; without RAY_ADDRESS, one that ends with this process.

    Left to itself, Ray would then join any cluster that it finds on this machine.
    """
    if address := os.environ.get("RAY_ADDRESS"):
        return {"address": address}
    return {"address": "local", "num_cpus": workers, "include_dashboard": False, "_temp_dir": folder}


def remote_job(work: Callable[[Any], Any]) -> Callable[[Any], "ray.ObjectRef"]:
    """Return a function that starts `work(item)` in some process of the cluster. A process unpacks `work` once."""
    import ray
    from ray import cloudpickle

    packed_work, root, folder = cloudpickle.dumps(work), str(ROOT), str(Path.cwd())
    unpacked: list[Callable[[Any], Any]] = []

    def job(packed_item: bytes) -> Any:  # it can name nothing of the suite, which its process does not know yet
        if not unpacked:
            for shared in (root, folder):
                if not os.path.isdir(shared):
                    reason = f"{socket.gethostname()} lacks a folder that all machines of the cluster must share"
                    raise NotADirectoryError(20, reason, shared)
            sys.path.insert(0, root)
            os.chdir(folder)  # relative paths mean the same
            os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the job has claimed one core and no GPU
            import torch

            torch.set_num_threads(1)
            unpacked.append(cloudpickle.loads(packed_work))
        return unpacked[0](cloudpickle.loads(packed_item))

    remote = ray.remote(job)
    return lambda item: remote.remote(cloudpickle.dumps(item))


def result(reference: "ray.ObjectRef") -> Any:
    """Wait for a job. Raises what it raised, or InputError where Ray's retries were in vain."""
    import ray

    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from error
    except ray.exceptions.RayError as error:
        problem = f"the Ray cluster has given up on a job ({first_line(error)})"
        raise InputError(f"{problem}; look at the memory of its machines, and run the same command again") from error


def first_line(error: Exception) -> str:
    return [*str(error).strip().splitlines(), type(error).__name__][0]
