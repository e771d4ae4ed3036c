"""Schedules against their formulas."""

import math

import pytest

from ssl_bench.optim import (
    SCHEDULES,
    batch_scale,
    constant,
    gradual_warmup,
    polynomial,
    released_warmup_cosine,
    warmup_cosine,
)


def test_constant():
    assert {constant()(k) for k in (0, 1, 10**9)} == {1.0}


def test_warmup_cosine_is_the_papers_formula():
    total, warmup, final = 50, 10, 1e-3
    schedule = warmup_cosine(total, warmup)
    for k in range(total + 1):
        if k < warmup:
            expected = k / warmup
        else:
            q = 0.5 * (1 + math.cos(math.pi * (k - warmup) / (total - warmup)))
            expected = q + final * (1 - q)
        assert schedule(k) == pytest.approx(expected, abs=1e-15)
    assert schedule(0) == 0.0
    assert schedule(warmup) == 1.0
    assert schedule(total) == pytest.approx(final)


def test_warmup_cosine_without_warmup_and_with_nothing_else():
    assert warmup_cosine(10, 0)(0) == 1.0
    assert [warmup_cosine(4, 4, final=0.5)(k) for k in range(5)] == [0.0, 0.25, 0.5, 0.75, 0.5]


@pytest.mark.parametrize("power", [1.0, 2.0])
def test_polynomial_is_the_formula(power):
    schedule = polynomial(20, power=power, final=0.01)
    for k in range(21):
        assert schedule(k) == pytest.approx(0.99 * (1 - k / 20) ** power + 0.01)
    assert schedule(0) == 1.0
    assert schedule(20) == 0.01


def test_polynomial_powers_differ():
    assert polynomial(20, power=1.0)(10) > 1.9 * polynomial(20, power=2.0)(10)


@pytest.mark.parametrize(
    "make", [lambda s: warmup_cosine(10, 2, strict=s), lambda s: polynomial(10, strict=s)], ids=["cosine", "polynomial"]
)
def test_beyond_the_end_it_clamps_or_refuses(make):
    assert make(False)(11) == make(False)(10) == make(True)(10)
    with pytest.raises(ValueError, match=r"step must be in \[0, total_steps=10\], got 11"):
        make(True)(11)
    with pytest.raises(ValueError, match="got -1"):
        make(False)(-1)


def test_released_schedule_cycles_and_ends_at_0_854():
    """1000 epochs on a cosine made for the probe's 100, 20 of warm-up (scheduler/lars_warmup.py, 89c3291)."""
    per_epoch = 98
    schedule = released_warmup_cosine(1000 * per_epoch, 20 * per_epoch, 100 * per_epoch)
    assert schedule(1000 * per_epoch) == pytest.approx(0.854, abs=1e-3)
    assert schedule(100 * per_epoch) == pytest.approx(1e-3)  # the first low
    assert schedule(180 * per_epoch) == pytest.approx(1.0)  # and up again
    right = warmup_cosine(1000 * per_epoch, 20 * per_epoch)
    assert right(1000 * per_epoch) == pytest.approx(1e-3)
    assert all(schedule(k) == right(k) for k in range(0, 20 * per_epoch, 49))  # the warm-up is sound
    with pytest.raises(ValueError, match=r"must be in \[0, total_steps=5\], got 6"):
        released_warmup_cosine(5, 1, 3, strict=True)(6)


def test_batch_scale():
    assert batch_scale("none", 16384, 512) == 1.0
    assert batch_scale("sqrt", 2048, 512) == 2.0
    assert batch_scale("linear", 2048, 512) == 4.0
    with pytest.raises(ValueError, match="rule must be one of none, sqrt, linear, got 'square'"):
        batch_scale("square", 2048, 512)
    with pytest.raises(ValueError, match="batch_size and base_batch must be >= 1, got 0 and 512"):
        batch_scale("none", 0, 512)


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: warmup_cosine(0, 0), "warmup_cosine: total_steps must"),
        (lambda: warmup_cosine(5, 6), "warmup_cosine: warmup_steps must"),
        (lambda: warmup_cosine(5, -1), "warmup_cosine: warmup_steps must"),
        (lambda: warmup_cosine(5, 1, final=1.5), "warmup_cosine: final must"),
        (lambda: polynomial(5, power=0.0), "polynomial: power must"),
        (lambda: polynomial(5, final=-0.1), "polynomial: final must"),
        (lambda: released_warmup_cosine(9, 3, 3), "released_warmup_cosine: warmup_steps must"),
    ],
)
def test_bad_values_are_refused_by_name(make, named):
    with pytest.raises(ValueError, match=f"^{named} .* got "):
        make()


def test_every_schedule_is_pure():
    made = {
        "constant": SCHEDULES["constant"](),
        "warmup_cosine": SCHEDULES["warmup_cosine"](30, 5),
        "polynomial": SCHEDULES["polynomial"](30),
        "released_warmup_cosine": SCHEDULES["released_warmup_cosine"](30, 5, 10),
        "gradual_warmup": SCHEDULES["gradual_warmup"](30, 512, 5),
    }
    assert made.keys() == SCHEDULES.keys()
    for schedule in made.values():
        forward = [schedule(k) for k in range(31)]
        assert [schedule(k) for k in reversed(range(31))] == forward[::-1]


def test_gradual_warmup_is_goyals():
    """8192 images: 0.1 per 256 at the first step, 3.2 after 5 epochs, then tenths at 30, 60 and 80 of 90 epochs."""
    per_epoch, batch = 10, 8192
    schedule = gradual_warmup(90 * per_epoch, batch, 5 * per_epoch)
    peak = 0.1 * batch_scale("linear", batch, 256)
    for k in range(90 * per_epoch + 1):
        if k < 5 * per_epoch:
            expected = 0.1 + (3.2 - 0.1) * k / (5 * per_epoch)
        else:
            expected = 3.2 * 0.1 ** sum(k >= epoch * per_epoch for epoch in (30, 60, 80))
        assert peak * schedule(k) == pytest.approx(expected, rel=1e-12)
    assert gradual_warmup(10, 128, 5)(0) == 1.0  # a batch below the base needs no warm-up
    assert gradual_warmup(10, 512, 0, milestones=())(9) == 1.0


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"batch_size": 0}, "batch_size must be >= 1, got 0"),
        ({"base_batch": 0}, "base_batch must be >= 1, got 0"),
        ({"milestones": (0.5, 0.4)}, r"milestones must be ascending in \(0, 1\], got \(0.5, 0.4\)"),
        ({"milestones": (0.5, 1.5)}, r"milestones must be ascending in \(0, 1\]"),
        ({"factor": 0.0}, r"factor must be in \(0, 1\], got 0"),
        ({"warmup_steps": 11}, r"warmup_steps must be in \[0, total_steps=10\], got 11"),
    ],
)
def test_gradual_warmup_refuses(keywords, message):
    with pytest.raises(ValueError, match=f"^gradual_warmup: {message}"):
        gradual_warmup(**({"total_steps": 10, "batch_size": 512, "warmup_steps": 2} | keywords))
