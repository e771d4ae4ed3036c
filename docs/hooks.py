"""For mkdocs: pages of the manual that lie outside docs/, and links from pages into the repository.

README.md's kin (`PAGES`) are pages of the site under their own paths. Any other file of the repository that a page
links to or shows is copied beside the pages, under files/; a link to a folder becomes its bare text. So one Markdown
text serves the site and a reader of the repository, and `mkdocs build --strict` checks all of its links.
"""

import os
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
PAGES = {  # in the repository -> in the site, where a README.md at the top would be another index.md
    "README.md": "overview.md",
    "results/README.md": "results/README.md",
    "benchmarks/README.md": "benchmarks/README.md",
    "CONTRIBUTING.md": "CONTRIBUTING.md",
    "CHANGELOG.md": "CHANGELOG.md",
}
LINK = re.compile(r"\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages from outside and the files that any page links to."""
    for name, place in PAGES.items():
        files.append(File.generated(config, place, abs_src_path=str(ROOT / name)))
    for file in [*files.documentation_pages()]:
        for _, target in LINK.findall(file.content_string):
            place = _place(_source(file.src_uri), target)
            if place and place.startswith("files/") and files.get_file_from_path(place) is None:
                source = str(ROOT / place.removeprefix("files/"))
                files.append(File.generated(config, place, abs_src_path=source))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:  # noqa: ARG001
    """Turns the repository's links into the site's."""
    here = page.file.src_uri

    def link(match: re.Match[str]) -> str:
        text, target = match.groups()
        place = _place(_source(here), target)
        if place is None:
            return match[0]
        if not place:
            return text
        anchor = target.partition("#")[1:]
        return f"[{text}]({os.path.relpath(place, Path(here).parent)}{''.join(anchor)})"

    return LINK.sub(link, markdown)


def _source(uri: str) -> Path:
    """Where the text of a page lies in the repository."""
    outside = {place: name for name, place in PAGES.items()}
    return ROOT / outside[uri] if uri in outside else ROOT / "docs" / uri


def _place(source: Path, target: str) -> str | None:
    """Where a link leads in the site; "" = nowhere, None = it is left alone, for mkdocs to check."""
    path = target.partition("#")[0]
    if not path or "://" in target or target.startswith("mailto:"):
        return None
    found = Path(os.path.normpath(source.parent / path))
    if not found.exists() or not found.is_relative_to(ROOT):
        return None
    name = found.relative_to(ROOT).as_posix()
    if name in PAGES:
        return PAGES[name]
    if name.startswith("docs/"):
        return name.removeprefix("docs/")
    return "" if found.is_dir() else f"files/{name}"
