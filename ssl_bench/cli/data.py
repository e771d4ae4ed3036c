"""``ssl-bench data list|prepare|verify|clear``: the data sets, and what is kept of them on this machine."""

from typing import Annotated

import typer

from ssl_bench.cli.options import Debug, finish

CacheDir = Annotated[str | None, typer.Option(help="The cache; left out: $SSL_BENCH_CACHE or ~/.cache/ssl_bench.")]

data_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)


def register(app: typer.Typer) -> None:
    """Adds the group."""
    app.add_typer(data_app, name="data", help="List, download, decode, check and remove data sets.")


@data_app.command("list")
def list_(cache_dir: CacheDir = None, debug: Debug = False) -> None:
    """Show the known data sets, and what of them is on this machine."""

    def command() -> int:
        from ssl_bench.data.cache import DOWNLOADS
        from ssl_bench.data.copies import copies, size_of
        from ssl_bench.data.dataset import SOURCES
        from ssl_bench.recipe.registry import installed
        from ssl_bench.runtime.paths import cache_folder

        directory = cache_folder(cache_dir)
        for name, about in SOURCES.items():
            print(f"{name:<16} {about}")
        for name, point in sorted(installed("dataset").items()):
            print(f"{name:<16} installed: {point.value}")
        there = copies(directory)
        downloads = directory / DOWNLOADS
        print(f"\n{directory}: {len(there)} decoded")
        for copy in there:
            about = copy.state
            if copy.meta is not None:
                counts = ", ".join(f"{count} {split}" for split, count in copy.meta.counts.items())
                about = f"{counts}, {'x'.join(map(str, copy.meta.shape[1:]))}"
            print(f"  {copy.folder.name:<40} {copy.size / 2**20:>9.1f} MiB  {about}")
        if downloads.is_dir():
            print(f"  {DOWNLOADS:<40} {size_of(downloads) / 2**20:>9.1f} MiB")
        return 0

    finish(command, debug)


@data_app.command()
def prepare(
    name: Annotated[str, typer.Argument(help="A data set, as in data=NAME.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, e.g. data.path=FOLDER data.size=64")] = None,
    debug: Debug = False,
) -> None:
    """Download and decode a data set now, so that a run starts at once.

    A download or a decoding that broke off is gone on with. Give the keys of data (data.path, data.size, ...) as the
    run will have them.
    """

    def command() -> int:
        from ssl_bench.recipe.compose import compose
        from ssl_bench.recipe.content import load
        from ssl_bench.runtime.interrupt import Interrupt

        words = [f"data={name}", *(overrides or [])]
        if wrong := [word for word in words[1:] if not word.startswith("data.")]:
            raise ValueError(f"data prepare takes keys of data only (data.path=, data.size=, ...), got {wrong[0]!r}")
        options = compose("pretrain", words).data
        with Interrupt():
            data = load(options, labels=False, test=False)
        sizes = f"{len(data.train)} train and {len(data.test)} test images of {data.train.image_shape[-1]} pixels"
        print(f"{data.name}: {sizes}, {len(data.classes)} classes, digest {data.digest}")
        return 0

    finish(command, debug)


@data_app.command()
def verify(
    names: Annotated[list[str] | None, typer.Argument(help="Data sets or copies; none = all.")] = None,
    cache_dir: CacheDir = None,
    debug: Debug = False,
) -> None:
    """Check every byte of the decoded copies.

    Compares each block with its digest; the exit code is 1 if one differs.
    """

    def command() -> int:
        from ssl_bench.data.copies import chosen
        from ssl_bench.data.copies import verify as faults_of
        from ssl_bench.runtime.interrupt import Interrupt
        from ssl_bench.runtime.paths import cache_folder

        faults: list[str] = []
        with Interrupt():
            for copy in chosen(cache_folder(cache_dir), names or []):
                found = faults_of(copy)
                faults += found
                print("\n".join(found) if found else f"{copy.folder}: whole ({copy.size / 2**20:.1f} MiB)")
        return 1 if faults else 0

    finish(command, debug)


@data_app.command()
def clear(
    names: Annotated[list[str] | None, typer.Argument(help="Data sets or copies, as data list shows them.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="All decoded copies.")] = False,
    downloads: Annotated[bool, typer.Option("--downloads", help="The downloaded files too.")] = False,
    cache_dir: CacheDir = None,
    debug: Debug = False,
) -> None:
    """Remove decoded copies, and downloads if asked.

    They are made again when a run needs them.
    """

    def command() -> int:
        from ssl_bench.data.copies import chosen, downloaded, remove, size_of
        from ssl_bench.runtime.paths import cache_folder

        if bool(names) == everything:
            raise ValueError(f"data clear takes names or --all, got {'both' if names else 'neither'}")
        directory, given = cache_folder(cache_dir), names or []
        files = downloaded(directory, given) if downloads else {}
        found = chosen(directory, given, without=files)
        doomed = [(copy.folder, directory / f"{copy.folder.name.removesuffix('.partial')}.lock") for copy in found]
        for folder, lock in [*doomed, *(pair for pairs in files.values() for pair in pairs)]:
            size = size_of(folder)
            remove(folder, lock)
            print(f"removed {folder} ({size / 2**20:.1f} MiB)")
        if not doomed and not files:
            print(f"{directory}: nothing to remove")
        return 0

    finish(command, debug)
