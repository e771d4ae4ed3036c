"""What the optimizer and the schedule of a recipe refuse is refused with the recipe, in its keys, units and values."""

import re

import pytest
import yaml

from ssl_bench.recipe.compose import compose
from ssl_bench.study.grid import load_study

REFUSED = [
    ("optimizer.lr=-1", "optimizer.lr must be a number in [0, inf), got -1.0"),
    ("optimizer.momentum=2", "optimizer.momentum must be a number in [0, 1), got 2.0"),
    ("optimizer.weight_decay=-1", "optimizer.weight_decay must be a number in [0, inf), got -1.0"),
    ("optimizer=adamw optimizer.betas=[0.9,3]", "optimizer.betas[1] must be a number in [0, 1), got 3.0"),
    ("optimizer=lamb optimizer.norm_bounds=[3,1]", "optimizer.norm_bounds must be None or (lo, hi) with 0 <= lo < hi"),
    ("optimizer=nesterov optimizer.momentum=0", "optimizer.momentum must be > 0 with nesterov=True, got 0.0"),
    ("optimizer=muon optimizer.momentum=3", "optimizer.momentum must be a number in [0, 1), got 3.0"),
    ("optimizer=tvlars optimizer.delay_fraction=0.5", "optimizer.delay_fraction must be 0 with variant='released'"),
    ("optimizer=tvlars optimizer.delay_epochs=2", "optimizer.delay_epochs must be 0 with variant='released', got 2"),
    ("schedule.warmup_fraction=2", "schedule.warmup_fraction must be in [0, 1], got 2"),
    ("epochs=4 schedule.warmup_epochs=20", "schedule.warmup_epochs must be in [0, epochs=4], got 20"),
    ("steps=9 schedule.warmup_steps=10", "schedule.warmup_steps must be in [0, steps=9], got 10"),
    ("schedule.warmup_steps=-5", "schedule.warmup_steps must be in [0, total_steps], got -5"),
    ("steps=9 schedule.warmup_epochs=-1", "schedule.warmup_epochs must be a number in [0, inf), got -1.0"),
    ("schedule.warmup_epochs=inf", "schedule.warmup_epochs must be a number in [0, inf), got inf"),
    ("schedule.warmup_fraction=nan", "schedule.warmup_fraction must be a number in [0, inf), got nan"),
    ("schedule.final=-3", "schedule.final must be in [0, 1], got -3.0"),
    ("schedule=polynomial schedule.power=-1", "schedule.power must be a number in (0, inf), got -1.0"),
    ("schedule=gradual_warmup schedule.milestones=[2]", "schedule.milestones must be ascending in (0, 1], got (2.0,)"),
]  # fmt: skip


@pytest.mark.parametrize(("words", "line"), REFUSED)
def test_a_value_out_of_range_is_refused_with_the_recipe(words: str, line: str) -> None:
    with pytest.raises(ValueError, match=re.escape(line)) as refused:
        compose("classify", words.split())
    assert str(refused.value).startswith(line)


@pytest.mark.parametrize(
    "words",
    [
        "steps=10 schedule.warmup_epochs=1",  # how many steps that is depends on the data set
        "epochs=1 schedule.warmup_steps=500000",  # whether that is too long, too
        "epochs=1 optimizer=tvlars optimizer.variant=paper optimizer.delay_epochs=1",
        "steps=1 schedule.warmup_fraction=1",
        "epochs=2 batch_size=1 schedule.warmup_steps=2400000",
        "steps=3 batch_size=100000 schedule.warmup_epochs=5",
        "epochs=0.001 schedule.warmup_fraction=0.1",
    ],
)
def test_what_may_fit_the_data_is_not_refused(words: str) -> None:
    compose("classify", words.split())


def test_units_that_depend_on_the_data_are_not_compared_with_steps() -> None:
    compose("pretrain", ["protocol=released", "schedule.schedule_steps=4000"])  # 20 epochs of warm-up may be less


def test_a_study_with_a_cell_that_cannot_run_is_refused_whole(tmp_path) -> None:
    study = {"base": {"data": "digits"}, "blocks": [{"track": "classify", "axes": [{"optimizer.lr": [1, -2]}]}]}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))
    with pytest.raises(ValueError, match=r"optimizer\.lr must be a number in \[0, inf\), got -2"):
        load_study(tmp_path / "study.yaml")
