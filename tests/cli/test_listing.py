"""What can be named, as a user sees it."""

import signal
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from ssl_bench import __version__, cli
from ssl_bench.cli.listing import KINDS
from ssl_bench.eval import EVALUATORS
from ssl_bench.methods import METHODS
from ssl_bench.optim import OPTIMIZERS, SCHEDULES
from ssl_bench.recipe.compose import choices


def listed(what: str) -> dict[str, str]:
    done = CliRunner().invoke(cli.app, ["list", what])
    assert done.exit_code == 0, done.output
    lines = done.output.splitlines()
    assert max(map(len, lines)) <= 120
    return {line.split()[0]: " ".join(line.split()[1:]) for line in lines}


@pytest.mark.parametrize(
    ("what", "known"),
    [
        ("methods", METHODS),
        ("optimizers", {*OPTIMIZERS, *choices("optimizer")}),
        ("schedules", SCHEDULES),
        ("evaluators", EVALUATORS),
        ("studies", {*choices("study"), *choices("tune")}),
        ("models", choices("model")),
        ("data", choices("data")),
    ],
)
def test_every_name_has_its_line_and_every_line_says_something(what, known):
    found = listed(what)
    assert set(known) <= found.keys()
    assert all(found.values())


def test_all_of_it_at_once_and_another_word_is_refused():
    done = CliRunner().invoke(cli.app, ["list"])
    assert [line for line in done.output.splitlines() if not line.startswith(" ")] == [f"{kind}:" for kind in KINDS]
    wrong = CliRunner().invoke(cli.app, ["list", "metods"])
    assert wrong.exit_code == 2
    assert "error: list: the argument must be methods, optimizers, " in wrong.stderr


def test_the_version_and_the_module():
    assert CliRunner().invoke(cli.app, ["--version"]).output == f"ssl_bench {__version__}\n"
    done = subprocess.run([sys.executable, "-m", "ssl_bench", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"ssl_bench {__version__}\n"


def test_a_reader_that_has_seen_enough_is_no_error():
    command, pipe = [sys.executable, "-u", "-m", "ssl_bench", "list"], subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "methods:\n"
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 128 + signal.SIGPIPE
