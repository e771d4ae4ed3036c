"""The code blocks of the README and the manual, and what the comment above each says of how it is tested."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "benchmarks/README.md", "results/README.md")]
PAGES += sorted((ROOT / "docs").glob("*.md"))

BLOCK = re.compile(r"(?:<!-- (not run|run by|fails): ?(.*?) -->\n)?```(\w+)([^\n]*)\n(.*?)```", re.DOTALL)


@dataclass(frozen=True)
class Block:
    """One block.

    Args:
        mark: "not run" and "fails" with a reason or a message in `about`, "run by" with a test's file, or "".
        file: the name that the text has as a file ("" = none).
    """

    page: Path
    mark: str
    about: str
    language: str
    file: str
    text: str

    def commands(self) -> list[list[str]]:
        """The commands of a shell block as words: continued lines joined, comments cut off."""
        joined = self.text.replace("\\\n", " ").replace("; ", "\n")
        found = [shlex.split(line, comments=True) for line in joined.splitlines() if not line.startswith("#")]
        return [words for words in found if words]


def blocks(page: Path) -> list[Block]:
    """All code blocks of a page, in order."""
    text = re.sub(r"<!-- run by (?!:)", "<!-- run by: ", page.read_text())
    found = []
    for mark, about, language, rest, content in BLOCK.findall(text):
        title = re.search(r'title="([^"]+)"', rest)
        found.append(Block(page, mark, about, language, title[1] if title else "", content))
    return found
