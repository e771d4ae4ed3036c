"""The first sentence: who is best, and how sure."""

from pathlib import Path

from synthetic_runs import write_run

from ssl_bench.records.reader import find_runs
from ssl_bench.report.aggregate import gather
from ssl_bench.report.leaderboard import answer


def told(folder: Path) -> str:
    return answer(gather(*find_runs(folder)))


def write(folder: Path, optimizer: str, *tops: float, **settings: object) -> None:
    for seed, top1 in enumerate(tops):
        name = folder / f"{optimizer}-{settings}-{seed}"
        write_run(name, optimizer=optimizer, seed=seed, top1=top1, telemetry=False, **settings)  # type: ignore[arg-type]


def test_one_setting_with_a_winner(tmp_path: Path) -> None:
    write(tmp_path, "lars", 80.0, 80.5, 81.0)
    assert told(tmp_path) == "Nothing is compared yet: no two optimizers have ended in one setting."
    write(tmp_path, "lamb", 60.0, 61.0, 60.5)
    assert told(tmp_path) == (
        "LARS is decidedly the best in classification, cifar10, batch size 512: 80.50% (95%: 79.26 … 81.74), ahead of "
        "LAMB (60.50%) (95% confidence, Holm's correction: 1 of 1 comparisons decided; n = 3 per optimizer)."
    )


def test_one_setting_without_a_winner(tmp_path: Path) -> None:
    write(tmp_path, "lars", 80.0)
    write(tmp_path, "lamb", 60.0)
    assert told(tmp_path) == (
        "No optimizer is decidedly the best in classification, cifar10, batch size 512: LARS has 80.00%, and LAMB "
        "(60.00%) cannot be told from it (95% confidence, Holm's correction: 0 of 1 comparisons decided; n = 1 per "
        "optimizer)."
    )


def test_several_settings_and_equal_tuning(tmp_path: Path) -> None:
    write(tmp_path, "lars", 80.0, 80.5, 81.0)
    write(tmp_path, "lamb", 60.0, 61.0, 60.5)
    write(tmp_path, "lars", 70.0, 71.0, batch_size=1024)
    write(tmp_path, "lars", 50.0, 51.0, batch_size=1024, lr=2.0)  # a second trial, which LAMB did not have
    write(tmp_path, "lamb", 69.0, 71.5, batch_size=1024)
    assert told(tmp_path) == (
        "Of 2 settings, decidedly the best is LARS in 1; in the other 1 the leaders cannot be told apart (95% "
        "confidence, Holm's correction: 1 of 2 comparisons decided; n = 2 to 3 per optimizer). With equally many "
        "trials for every optimizer the highest expected accuracy is another one's: LAMB instead of LARS in 1 of 2 "
        "settings."
    )
