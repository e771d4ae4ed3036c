"""Cells as forks of a warm process: the same as their commands run anew, in what they do at signals too."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from commands import TINY_CLASSIFY, environment, metrics, results
from waiting import wait_for

from ssl_bench.study import warm

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere a cell's command is run itself")

# A program without `if __name__ == "__main__"`, whose first line counts how often it runs.
LAUNCHER = """
import json, os, signal, sys
from pathlib import Path
open("counted", "a").write("x")
signal.signal(signal.SIGUSR2, lambda *_: None)
from ssl_bench.study import warm
children, server = [], warm.ForkServer()
for line in sys.stdin:
    order, *words = json.loads(line)
    environment = dict(os.environ, SSL_BENCH_LAUNCHER=str(os.getpid()))
    if order == "start":
        children.append(server.start([sys.executable, "-m", *words[1:]], environment, Path(words[0])))
        answer = children[-1] and children[-1]._number
    elif order == "process":
        while words[0] not in server.processes:
            server.look()
        answer = server.processes[words[0]]
    elif order == "other":
        answer = server.start([sys.executable, "-m", *words[1:]], environment | {"OTHER": "1"}, Path(words[0]))
    elif order == "server":
        answer = server._server.pid
    else:
        answer = getattr(children[words[0]], order)()
    print(json.dumps(answer), flush=True)
"""
FOREVER = (*TINY_CLASSIFY, "epochs=100000", "eval.test_every_epochs=0", "checkpoint.every_epochs=0")


class Launcher:
    """A process that starts cells; called with an order, it answers."""

    def __init__(self, folder: Path) -> None:
        (folder / "launcher.py").write_text(LAUNCHER)
        (folder / "mine.py").write_text("from tiny_net import tiny_smooth as network  # noqa: F401\n")
        self.folder, self.started = folder, 0
        self.process = subprocess.Popen(
            [sys.executable, "launcher.py"], cwd=folder, env=environment(), text=True, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip

    def __call__(self, *order: Any) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def end(self) -> None:
        """Kills it, and nothing else."""
        self.process.kill()
        self.process.communicate()

    def start(self, log: str, *words: str) -> int:
        """Starts a classification; its place among those started."""
        (self.folder / log).write_text("before\n")
        assert isinstance(self("start", log, "ssl_bench.classify", *words), int)
        self.started += 1
        return self.started - 1

    def run(self, log: str, *words: str) -> tuple[int, str]:
        """Runs a classification to its end; its exit code and output."""
        code = self("wait", self.start(log, *words))
        text = (self.folder / log).read_text()
        assert text.startswith("before\n")
        return code, text.removeprefix("before\n")


@pytest.fixture(scope="module")
def launcher(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launcher]:
    one = Launcher(tmp_path_factory.mktemp("warm"))
    yield one
    one.end()


def anew(launcher: Launcher, *words: str) -> tuple[int, str]:
    """The same command in a new Python; its exit code and output."""
    done = subprocess.run(
        [sys.executable, "-m", "ssl_bench.classify", *words], cwd=launcher.folder, env=environment(), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False,
    )  # fmt: skip
    return done.returncode, done.stdout


def test_a_run_is_that_of_its_command(launcher: Launcher) -> None:
    words = (*TINY_CLASSIFY, "model.name=mine:network", "steps=3")  # a plug-in in the working folder
    assert launcher.run("run.log", *words, "run_dir=warm")[0] == 0
    code, text = anew(launcher, *words, "run_dir=cold")
    assert code == 0, text
    ours, theirs = ([{**line, "seconds": 0, "images_per_second": 0} for line in metrics(launcher.folder / name)]
                    for name in ("warm", "cold"))  # fmt: skip
    assert ours == theirs
    assert results(launcher.folder / "warm")["evaluations"] == results(launcher.folder / "cold")["evaluations"]
    records = [json.loads((launcher.folder / name / "run.json").read_text()) for name in ("warm", "cold")]
    for record, name in zip(records, ("warm", "cold"), strict=True):
        assert record["argv"] == [warm_main(), *words, f"run_dir={name}"]
        for key in ("argv", "started", "recipe"):
            del record[key]
    assert records[0] == records[1]


def warm_main() -> str:
    import ssl_bench.classify

    return str(ssl_bench.classify.__file__)


@pytest.mark.parametrize("words", [("--help",), ("optimizer=unknown",), ("no_such_key=1", "--debug")])
def test_what_it_says_and_its_exit_code_too(launcher: Launcher, words: tuple[str, ...]) -> None:
    def without_lines(said: tuple[int, str]) -> tuple[int, str]:
        return said[0], re.sub(r"  File .*\n|    .*\n", "", said[1]) if "--debug" in words else said[1]

    assert without_lines(launcher.run("said.log", *words)) == without_lines(anew(launcher, *words))


def test_a_signal_is_answered_by_saving_even_at_once(launcher: Launcher) -> None:
    at_once = launcher.start("at_once.log", *FOREVER, "run_dir=at_once")
    launcher("terminate", at_once)
    assert launcher("wait", at_once) in (-signal.SIGTERM, 75)  # before or after there is somebody to answer
    later = launcher.start("later.log", *FOREVER, "run_dir=later")
    wait_for(lambda: (launcher.folder / "later" / "metrics.jsonl").exists())
    assert launcher("poll", later) is None
    launcher("terminate", later)
    assert launcher("wait", later) == 75
    assert list((launcher.folder / "later").glob("checkpoints/*"))
    killed = launcher.start("killed.log", *FOREVER, "run_dir=killed")
    launcher("kill", killed)
    assert launcher("wait", killed) == launcher("poll", killed) == -signal.SIGKILL


def test_signals_for_the_whole_job_do_not_end_the_server(launcher: Launcher) -> None:
    launcher.run("first.log", "--help")
    server = launcher("server")
    for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        os.kill(server, number)
    assert launcher.run("again.log", "--help")[0] == 0
    assert launcher("server") == server


def test_a_run_ignores_the_launcher_s_warning(launcher: Launcher) -> None:
    number = launcher.start("warned.log", *FOREVER, "run_dir=warned")
    process = launcher("process", number)
    wait_for(lambda: (launcher.folder / "warned" / "metrics.jsonl").exists())
    os.kill(process, signal.SIGUSR2)
    assert os.getsid(process) == process  # a Ctrl-C in the launcher's terminal does not reach it
    os.kill(process, signal.SIGINT)
    assert launcher("wait", number) == 75


def test_the_program_that_starts_cells_is_not_run_again(launcher: Launcher) -> None:
    launcher.run("help.log", "--help")
    assert (launcher.folder / "counted").read_text() == "x"


def test_another_environment_or_command_runs_by_itself(launcher: Launcher) -> None:
    launcher.run("help.log", "--help")
    assert launcher("other", "other.log", "ssl_bench.classify", "--help") is None
    for command in (["true"], [sys.executable, "-m", "ssl_bench", "classify"], [sys.executable, "-c", "pass"]):
        assert warm.ForkServer().start(command, {}, launcher.folder / "none.log") is None


def test_a_run_whose_server_was_killed_saves_and_is_one_to_start_again(tmp_path: Path) -> None:
    launcher = Launcher(tmp_path)
    number = launcher.start("run.log", *FOREVER, "run_dir=run")
    wait_for(lambda: (tmp_path / "run" / "metrics.jsonl").exists())
    os.kill(launcher("server"), signal.SIGKILL)
    assert launcher("wait", number) == 75
    assert list((tmp_path / "run").glob("checkpoints/*"))  # it was waited for
    assert launcher("start", "next.log", "ssl_bench.classify", "--help") is None
    launcher.end()


def test_a_signal_before_the_server_is_ready_is_not_lost(tmp_path: Path) -> None:
    launcher = Launcher(tmp_path)
    number = launcher.start("run.log", *FOREVER, "run_dir=run")
    assert launcher("poll", number) is None
    launcher("terminate", number)
    assert launcher("wait", number) in (-signal.SIGTERM, 75)
    launcher.end()


def test_forks_differ_in_what_the_system_draws_for_them(launcher: Launcher) -> None:
    (launcher.folder / "drawn.py").write_text(
        "import atexit, multiprocessing, sys\nimport numpy as np\nfrom tiny_net import tiny_smooth\n"
        "def network(**options):\n"
        "    print('drawn', np.random.rand(), multiprocessing.get_start_method(), sys.path[0])\n"
        "    atexit.register(print, 'ended')\n"
        "    return tiny_smooth(**options)\n"
    )
    words = (*TINY_CLASSIFY, "model.name=drawn:network", "steps=1")
    said = [launcher.run(f"{i}.log", *words, f"run_dir=drawn{i}")[1] for i in range(2)]
    said.append(anew(launcher, *words, "run_dir=drawn2")[1])
    drawn = [re.findall(r"drawn (\S+) (\S+) (\S+)", text)[0] for text in said]
    assert len({number for number, *_ in drawn}) == 3
    assert len({tuple(rest) for _, *rest in drawn}) == 1
    assert all(text.splitlines().count("ended") == said[-1].splitlines().count("ended") > 0 for text in said)


def test_a_run_saves_when_its_launcher_dies(tmp_path: Path) -> None:
    launcher = Launcher(tmp_path)
    launcher.start("run.log", *FOREVER, "run_dir=run")
    wait_for(lambda: (tmp_path / "run" / "metrics.jsonl").exists())
    launcher.end()
    wait_for(lambda: "exiting with code 75" in (tmp_path / "run.log").read_text())
    wait_for(lambda: bool(list((tmp_path / "run").glob("checkpoints/*"))))


def test_what_is_preloaded_leaves_gpus_alone() -> None:
    # A process that is forked after CUDA's start cannot use it.
    code = (
        "import torch\n"
        "def asked(*_): raise AssertionError('a GPU was asked for')\n"
        "for name in ('_cuda_init', '_cuda_getDeviceCount'):\n"
        "    if hasattr(torch._C, name): setattr(torch._C, name, asked)\n"
        "from ssl_bench.cli.fork_server import preload; preload()\n"
        "assert not torch.cuda.is_initialized()\n"
        "import threading; assert threading.active_count() == 1\n"
    )
    subprocess.run([sys.executable, "-c", code], env=environment(), check=True)
