"""The report's answer: one sentence on which optimizer is best and how sure that is."""

from collections import Counter
from collections.abc import Sequence

from ssl_bench.report.aggregate import Collection, Setting
from ssl_bench.report.comparisons import Arm, arms, at_equal_tuning, at_their_best, best_arms, ranks
from ssl_bench.report.tables import between


def answer(collection: Collection) -> str:
    """Who is best in how many settings, and in how many nobody can be told; one sentence or two."""
    compared = {setting: best_arms(contenders) for setting, contenders in arms(collection).items()}
    compared = {setting: found for setting, found in compared.items() if len(found) > 1}
    if not compared:
        return "Nothing is compared yet: no two optimizers have ended in one setting."
    families = {setting: at_their_best(found) for setting, found in compared.items()}
    places = {setting: ranks(found, families[setting]) for setting, found in compared.items()}
    leaders = {setting: [name for name, place in each.items() if place[0] == 1] for setting, each in places.items()}
    decided = sum(one.decided for family in families.values() for one in family)
    total = sum(map(len, families.values()))
    counts = sorted({len(arm.best.top1(arm.protocol)) for found in compared.values() for arm in found if arm.best})
    seeds = f"n = {counts[0]}" + (f" to {counts[-1]}" if counts[-1] > counts[0] else "") if counts else "n = 0"
    how = f"95% confidence, Holm's correction: {decided} of {total} comparisons decided; {seeds} per optimizer"
    if len(compared) == 1:
        ((setting, found),) = compared.items()
        return _of_one(setting, found, leaders[setting], how) + _at_equal_tuning(collection, {setting: found})
    names = {arm.name: arm.optimizer for found in compared.values() for arm in found}
    best = Counter(names[each[0]] for each in leaders.values() if len(each) == 1)
    won = ", ".join(f"{name} in {count}" for name, count in best.most_common())
    open_ = len(compared) - best.total()
    if not best:
        text = f"In none of {len(compared)} settings is one optimizer decidedly the best"
    else:
        text = f"Of {len(compared)} settings, decidedly the best is {won}"
        text += f"; in the other {open_} the leaders cannot be told apart" if open_ else ""
    return f"{text} ({how})." + _at_equal_tuning(collection, compared)


def _of_one(setting: Setting, found: Sequence[Arm], leaders: Sequence[str], how: str) -> str:
    ordered = sorted(found, key=lambda arm: arm.top1 or 0.0, reverse=True)
    first, others = ordered[0], [arm for arm in ordered[1:] if arm.name in leaders]
    ends = first.best.interval(first.protocol) if first.best else None
    score = f"{first.top1:.2f}%" + (f" (95%: {between(ends)})" if ends else "")
    if not others:
        rest = ", ".join(f"{arm.optimizer} ({arm.top1:.2f}%)" for arm in ordered[1:])
        return f"{first.optimizer} is decidedly the best in {setting}: {score}, ahead of {rest} ({how})."
    equal = ", ".join(f"{arm.optimizer} ({arm.top1:.2f}%)" for arm in others)
    told = f"{first.optimizer} has {score}, and {equal} cannot be told from it"
    return f"No optimizer is decidedly the best in {setting}: {told} ({how})."


def _at_equal_tuning(collection: Collection, compared: dict[Setting, list[Arm]]) -> str:
    """Where another optimizer leads once every one has the same number of trials; empty where none does."""
    grouped, other = arms(collection), []
    for setting, found in compared.items():
        _, equal = at_equal_tuning(grouped[setting])
        first = max(found, key=lambda arm: arm.top1 or 0.0).optimizer
        best = max(equal, key=lambda name: equal[name])
        if equal[best] > equal[first]:
            other.append(f"{best} instead of {first}")
    if not other:
        return ""
    told = ", ".join(f"{text} in {count}" for text, count in Counter(other).most_common())
    return f" With equally many trials for every optimizer the highest expected accuracy is another one's: {told}."
