"""The tables of accuracies: ours alone, and beside the paper's Table 1."""

from collections import defaultdict
from collections.abc import Mapping, Sequence

from ssl_bench.report.aggregate import Cell, Collection
from ssl_bench.report.paper import EPOCHS, MARKS, Key, PaperCell, bold_rule_broken, bold_verdict, paper_key, table1
from ssl_bench.report.scope import beside_the_papers, cut_short, epochs_trained, scope, short
from ssl_bench.report.tables import Table, Value, number, points, signed

OPTIMIZERS = ("lars", "lamb", "tvlars")  # the paper's, in its order


def results_table(collection: Collection, problem: str) -> Table:
    """Every cell of one problem: each protocol's accuracy, beside it the untrained model's."""
    protocols = collection.protocols(problem) or [collection.headline(problem)]
    cells = [cell for cell in collection.cells if cell.problem == problem]
    columns = ["data set", "batch size", "lr", "optimizer", "variant"]
    for protocol in protocols:
        columns += [f"{protocol} top-1 %", "untrained"]
    rows, records = [], []
    for cell in cells:
        row = [cell.dataset, str(cell.batch_size), number(cell.lr), cell.optimizer, cell.variant]
        for protocol in protocols:
            row += [cell.text(protocol), points(cell.untrained(protocol).mean)]
            records.append(record_of(cell, protocol))
        rows.append((*row, *_length(cell)))
    notes = (
        "Mean ± sample standard deviation over n seeds, of the last epoch; n = 1 has no deviation. A run that diverged "
        "or collapsed has no accuracy and is in no mean. Untrained: the same protocol before the first step.",
    )
    return Table(
        f"results-{problem}",
        f"Results: {problem}",
        (*columns, "epochs", "minutes"),
        rows,
        records,
        notes,
        [cell.key for cell in cells],
    )


def table1_long(collection: Collection, *, complete: bool) -> Table:
    """Our cells beside the paper's Table 1, one row for each.

    Args:
        collection: our cells; those that have no place in Table 1 are left out.
        complete: whether numbers of the paper that we have no run for are rows too.
    """
    ours = matched(collection)
    rows, records, keys = [], [], []
    none: list[Cell | None] = [None] if complete else []
    for key, paper in sorted(table1().items(), key=_place):
        for cell in [*ours.get(key, [])] or none:
            record = _beside(paper, cell, ours, collection)
            records.append(record)
            keys.append(cell.key if cell else "")
            epochs = beside_the_papers([cell] if cell else [], key[0])
            rows.append(
                (
                    *(key[0], key[1], str(key[2]), number(key[3]), key[4].upper()),
                    *(str(record["ours"]), f"{paper.accuracy:.2f}{' (bold)' if paper.bold else ''}"),
                    *(signed(record["difference"]), epochs, str(record["mark"] or ""), str(record["variant"] or "")),
                )
            )
    columns: tuple[str, ...]
    columns = ("problem", "data set", "batch size", "lr", "optimizer", "ours, top-1 %", "paper")
    columns = (*columns, "difference", "epochs, ours / paper", "bold holds", "variant")
    return Table("table1", "Table 1 of the paper, and ours", columns, rows, records, table1_notes(collection), keys)


def table1_wide(collection: Collection) -> Table:
    """Table 1 as the paper lays it out: the optimizers side by side, ours / the paper's (difference)."""
    ours = matched(collection)
    rows = []
    for point in dict.fromkeys(key[:4] for key, _ in sorted(table1().items(), key=_place)):
        columns = {name: ours.get((*point, name), []) for name in OPTIMIZERS}
        for index in range(max(map(len, columns.values()))):
            texts, variants, shown = [], [], []
            for name, cells in columns.items():
                if index >= max(1, len(cells)):
                    texts.append("")
                    continue
                paper = table1()[*point, name]
                cell = cells[index] if index < len(cells) else None
                record = _beside(paper, cell, ours, collection)
                bold = "**" if paper.bold else ""
                mine = f"{record['ours']} / " if cell else "– / "
                texts.append(f"{mine}{bold}{paper.accuracy:.2f}{bold} {record['mark'] or ''}".rstrip())
                shown += [cell] if cell else []
                if cell and cell.variant:
                    variants.append(f"{cell.optimizer}: {cell.variant}")
            epochs = beside_the_papers(shown, point[0])
            rows.append((point[0], point[1], str(point[2]), number(point[3]), *texts, epochs, "; ".join(variants)))
    columns_ = (
        "problem",
        "data set",
        "batch size",
        "lr",
        "LARS, ours / paper",
        "LAMB, ours / paper",
        "TVLARS, ours / paper",
        "epochs, ours / paper",
    )
    title = "Table 1 in the paper's layout: ours / the paper's"
    return Table("table1-wide", title, (*columns_, "variant"), rows, [], table1_notes(collection))


def table1_notes(collection: Collection) -> tuple[str, ...]:
    """How to read Table 1, with what the paper's own numbers say about its bold rule."""
    broken, bold = bold_rule_broken()
    used = ", ".join(f"{name}: {collection.headline(name)}" for name in ("classification", "barlow_twins"))
    marks = (
        "With fewer epochs than the paper's no mark confirms or refutes a number of the paper: who is ahead changes."
    )
    return (
        *scope(collection),
        *([marks] if any(cut_short(cell) for cells in matched(collection).values() for cell in cells) else []),
        "The paper's epochs: for Barlow Twins by its text; for classification, where that states none, by its figures "
        "and its authors' code. Ours are those trained so far.",
        f"Protocol of ours: {used}. The paper's numbers are single runs by a protocol that it does not state.",
        "Bold in the paper means ahead by at least 1 point. In our means ✓: so it is, ~: a lead of less than 1 point, "
        "✗: none, ?: cannot be told yet; of several variants of a rival the best one counts.",
        f"In the paper's own table {broken} of the {bold} bold numbers do not lead both others by 1 point.",
    )


def matched(collection: Collection) -> dict[Key, list[Cell]]:
    """Our cells by their place in the paper's Table 1."""
    ours: dict[Key, list[Cell]] = defaultdict(list)
    for cell in collection.cells:
        if paper_key(cell) in table1():
            ours[paper_key(cell)].append(cell)
    return dict(ours)


def record_of(cell: Cell, protocol: str) -> dict[str, Value]:
    """A cell's numbers by one protocol, for programs."""
    summary, untrained = cell.summary(protocol), cell.untrained(protocol)
    return {
        "problem": cell.problem,
        "dataset": cell.dataset,
        "batch_size": cell.batch_size,
        "lr": cell.lr,
        "optimizer": cell.optimizer,
        "variant": cell.variant,
        "cell": cell.key,
        "protocol": protocol,
        "top1_mean": summary.mean,
        "top1_sd": summary.sd,
        "n": summary.n,
        "runs": len(cell.results),
        **{word: cell.statuses[word] for word in ("finished", "diverged", "collapsed", "interrupted", "running")},
        "untrained_mean": untrained.mean,
        "untrained_sd": untrained.sd,
        "chance": cell.chance(protocol),
    }


def _place(item: tuple[Key, PaperCell]) -> tuple[bool, str, int, float, int]:
    """Sorts Table 1 so that the optimizers of one learning rate stand together."""
    problem, dataset, batch_size, lr, optimizer = item[0]
    return problem != "classification", dataset, batch_size, lr, OPTIMIZERS.index(optimizer)


def _verdict(paper: PaperCell, cell: Cell | None, ours: Mapping[Key, Sequence[Cell]], protocol: str) -> str | None:
    """The mark of a bold number; None where the paper's is not bold."""
    if not paper.bold:
        return None
    if cell is None:
        return MARKS["open"]
    others = [name for name in OPTIMIZERS if name != paper.key[4]]
    rivals = [rival for name in others for rival in ours.get((*paper.key[:4], name), [])]
    return MARKS[bold_verdict(cell, rivals, protocol)]


def _beside(
    paper: PaperCell, cell: Cell | None, ours: Mapping[Key, Sequence[Cell]], collection: Collection
) -> dict[str, Value]:
    """One line of the comparison with the paper."""
    key = paper.key
    protocol = collection.headline(key[0])
    summary = cell.summary(protocol) if cell else None
    mean = summary.mean if summary else None
    return {
        "problem": key[0], "dataset": key[1], "batch_size": key[2], "lr": key[3], "optimizer": key[4],
        "variant": cell.variant if cell else None,
        "protocol": protocol,
        "ours": cell.text(protocol) if cell else "no run",
        "top1_mean": mean,
        "top1_sd": summary.sd if summary else None,
        "n": summary.n if summary else 0,
        "paper": paper.accuracy,
        "paper_bold": str(paper.bold),
        "difference": mean - paper.accuracy if mean is not None else None,
        "mark": _verdict(paper, cell, ours, protocol),
        "epochs": epochs_trained([cell]) if cell else None,
        "paper_epochs": EPOCHS.get(key[0]),
    }  # fmt: skip


def _length(cell: Cell) -> tuple[str, str]:
    """Epochs trained and the median minutes of training."""
    last = [result.record.metrics[-1] for result in cell.results if result.record.metrics]
    minutes = sorted(row.get("seconds", 0.0) / 60 for row in last)
    return short(epochs_trained([cell])), f"{minutes[len(minutes) // 2]:.3g}" if minutes else "–"
