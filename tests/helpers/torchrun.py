"""Runs a function of a test file in several gloo processes on the CPU, started by torchrun as a user would.

In a test: ``results = torchrun(worker, 4, tmp_path)``, with ``worker`` at the top level of the test's file. Each
process calls ``worker()`` inside a process group; ``results[rank]`` is what it returned (tensors, numbers, strings,
lists, dicts).
"""

import importlib.util
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def torchrun(
    worker: Callable[[], Any], world_size: int, folder: Path, *, gpu: bool = False, timeout: float = 300
) -> list[Any]:
    """Starts the processes, waits, and collects what each returned.

    Args:
        worker: a function without arguments at the top level of its file.
        world_size: the number of processes.
        folder: an empty folder for the results.
        gpu: let the processes see the GPUs; gloo copies a GPU's tensors through the CPU.
        timeout: seconds after which the processes are stopped.

    Raises:
        AssertionError: with the processes' output, if one of them failed.
    """
    source = Path(worker.__code__.co_filename)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world_size}"]
    command = [*launch, __file__, str(source), worker.__name__, str(folder)]
    env = os.environ | {"OMP_NUM_THREADS": "1"} | ({} if gpu else {"CUDA_VISIBLE_DEVICES": ""})
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=env, check=False)
    assert done.returncode == 0, f"{source.name}:{worker.__name__} failed\n{done.stdout[-2000:]}{done.stderr[:6000]}"
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(world_size)]


def _main(source: str, name: str, folder: str) -> None:
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    spec = importlib.util.spec_from_file_location("worker_file", source)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["worker_file"] = module
    sys.path.insert(0, str(Path(source).parent))
    dist.init_process_group("gloo")
    try:
        spec.loader.exec_module(module)
        torch.save(getattr(module, name)(), Path(folder) / f"{dist.get_rank()}.pt")
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    _main(*sys.argv[1:])
    # An ordinary exit after gloo aborts now and then in the interpreter's clean-up.
    os._exit(0)
