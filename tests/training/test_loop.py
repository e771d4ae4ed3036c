"""The loop itself: its clocks, its rhythm, and what a gradient scaler does to them."""

from functools import partial

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from tape import TapeRecorder
from torch import nn

from ssl_bench.augment.views import Labels, Normalize
from ssl_bench.data.pipeline import Pipeline
from ssl_bench.data.sources import ResidentSource
from ssl_bench.methods import Method
from ssl_bench.optim import TVLARS, Telemetry, build_groups
from ssl_bench.training.gradient import compute_gradient
from ssl_bench.training.graphs import GraphedGradient, GraphedUpdate
from ssl_bench.training.loop import LAG, Hook, Trainer
from ssl_bench.training.monitor import Arriving
from ssl_bench.training.plan import Rhythm


class Task(Method):
    """A linear classifier."""

    per_sample = True

    def __init__(self):
        super().__init__(nn.Flatten(1), 48, nn.Identity())
        self.linear = nn.Linear(3 * 4 * 4, 5)
        self.begun = []

    def begin_step(self, progress):
        self.begun.append((progress, torch.is_grad_enabled()))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
        """Images and labels to the scores."""
        return {"scores": self.linear(x.flatten(1)), "labels": y}

    def loss(self, scores, labels):
        """Cross entropy."""
        return {"loss": nn.functional.cross_entropy(scores, labels)}


class Record:
    """A `RunIO` that keeps what the loop hands over."""

    def __init__(self, interrupted=lambda: False):
        self.rows, self.columns, self.saved, self.interrupted = [], [], [], interrupted

    def log(self, row):
        self.rows.append(row)

    def log_telemetry(self, columns):
        self.columns.append(columns)

    def save(self, step, state):
        self.saved.append((step, state))

    def snapshot(self, step, module):
        pytest.fail(f"no snapshot of {module} was asked for at step {step}")

    def should_stop(self, _step):
        return self.interrupted()

    def progress(self, step, row):
        pass


def trainer(
    *, total=12, scaler=None, hooks=(), checkpoint=0, interrupted=lambda: False, schedule=None, record_every=1,
    fused=None, lag=0, **batches,
):  # fmt: skip
    torch.manual_seed(0)
    images = torch.randint(0, 256, (64, 3, 4, 4), dtype=torch.uint8)
    source = ResidentSource(images, torch.arange(64) % 5)
    normalize = Normalize(mean=(0.5,) * 3, std=(0.25,) * 3)
    device = torch.device("cpu")
    pipeline = Pipeline(
        source, [normalize, Labels()], seed=0, chunk_size=None, rank=0, world_size=1, device=device,
        **{"batch_size": 16, **batches},
    )  # fmt: skip
    accelerator = Accelerator(cpu=True)
    task = Task()
    optimizer = TVLARS(build_groups(task, lr=1.0, weight_decay=0.0), lr=1.0, decay=0.1, fused=fused)
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    model, wrapped = accelerator.prepare(task, optimizer)
    if scaler is not None:
        accelerator.scaler = scaler
        wrapped = AcceleratedOptimizer(optimizer, scaler=scaler)
        accelerator._optimizers = [wrapped]
    record = Record(interrupted)
    built = Trainer(
        model=model, optimizer=wrapped, schedule=schedule or (lambda _k: 1.0), gradient=compute_gradient,
        pipeline=pipeline,
        rhythm=Rhythm(total=total, log=4, checkpoint=checkpoint, check_equal=0), accelerator=accelerator, io=record,
        telemetry=Telemetry(optimizer, every=record_every), hooks=hooks,
    )  # fmt: skip
    built.lag = lag
    return built, record, optimizer


WAITS = pytest.mark.parametrize("lag", [0, LAG])  # for a line of the metrics at once, or as on a GPU


def test_every_interval_has_a_line_and_the_end_too():
    loop, record, _ = trainer(total=10)
    outcome = loop.run()
    assert (outcome.status, outcome.step) == ("finished", 10)
    assert [row["step"] for row in record.rows] == [4, 8, 10]
    assert [row["samples"] for row in record.rows] == [64, 128, 160]
    assert record.rows[0]["epochs"] == 1.0


def test_a_line_is_waited_for_when_later_steps_have_been_started_unless_something_needs_it(monkeypatch):
    waited = []  # for which step's line, and after how many steps

    class Watched(Arriving):
        def __init__(self, tensor):
            super().__init__(tensor)
            self.begun = loop.step

        def values(self):
            waited.append((self.begun, loop.step))
            return super().values()

    monkeypatch.setattr("ssl_bench.training.loop.Arriving", Watched)
    runs = []
    for lag, expected in ((0, []), (2, [(4, 6), (8, 9), (9, 9), (12, 14), (16, 17), (18, 18), (20, 21), (21, 21)])):
        waited.clear()
        loop, record, _ = trainer(total=21, lag=lag, hooks=[Hook(9, lambda step: {"measured": step})])
        loop.rhythm.snapshots, loop.io.snapshot = frozenset({17}), lambda *_: None
        loop.run()
        assert sorted(set(waited)) == (expected or [(step, step) for step in (4, 8, 9, 12, 16, 18, 20, 21)])
        assert all(row["images_per_second"] > 0 for row in record.rows)
        assert [row["seconds"] for row in record.rows] == sorted(row["seconds"] for row in record.rows)
        runs.append(record)
    rows, late = ([{k: v for k, v in row.items() if "second" not in k} for row in run.rows] for run in runs)
    assert rows == late
    for one, other in zip(runs[0].columns, runs[1].columns, strict=True):
        assert one["step"] == other["step"]
        torch.testing.assert_close(one["ratio"], other["ratio"], rtol=0, atol=0, equal_nan=True)


def seen(weight, _step):
    return {"seen": float(weight.sum())}


def test_replayed_steps_train_as_plain_ones_do_whatever_the_rhythm():
    """The loop around a replay: schedule, telemetry, guard, hooks and checkpoints in between."""
    runs = []
    for graphed in (False, True):
        loop, record, optimizer = trainer(
            total=29, checkpoint=5, batch_size=24, last_batch="short", schedule=lambda k: 1 / (1 + k), record_every=4,
            fused=False,
        )  # fmt: skip
        loop.hooks = [Hook(3, partial(seen, loop.module.linear.weight.detach()))]
        passes, updates = TapeRecorder(), TapeRecorder()
        gradient = GraphedGradient(compute_gradient, loop.module, pytest.fail, passes)
        if graphed:
            loop.gradient = gradient
        loop.graphed_update = GraphedUpdate(optimizer, lambda g=gradient: g.replaying, pytest.fail, updates)
        loop.run()
        # Every third batch is short and runs plainly; of 20 whole ones 3 are to warm up. Of the 16 that are replayed
        # without a comparison, telemetry has 4, and 3 are to warm up again.
        assert passes.replays == (17 if graphed else 0)
        assert updates.replays == (9 if graphed else 0)
        assert loop.graphed_update.used == ("replayed" if graphed else "no step was replayed")
        runs.append((loop, record))
    (plain, rows), (replayed, again) = runs
    timeless = [[{k: v for k, v in row.items() if "second" not in k} for row in r.rows] for r in (rows, again)]
    assert timeless[0] == timeless[1]
    assert torch.equal(plain.module.linear.weight, replayed.module.linear.weight)
    for ours, theirs in zip(again.columns, rows.columns, strict=True):
        assert ours["layer"] == theirs["layer"]
        torch.testing.assert_close(ours["ratio"], theirs["ratio"], rtol=0, atol=0, equal_nan=True)
    assert len(rows.saved) == len(again.saved) == 5
    for (_, state), (_, other) in zip(rows.saved, again.saved, strict=True):
        assert torch.equal(state["model"]["linear.weight"], other["model"]["linear.weight"])


def test_the_method_hears_of_every_step_before_it_and_outside_the_graph():
    loop, _, _ = trainer(total=4)
    loop.run()
    assert loop.module.begun == [(0, False), (0.25, False), (0.5, False), (0.75, False)]


def test_the_losss_scale_scales_the_gradient_and_no_number_that_is_recorded():
    losses, gradients = [], []
    for scale in (1, 0.25, 3):
        loop, record, optimizer = trainer(total=1)
        loop.loss_scale = scale
        weight = loop.module.linear.weight
        optimizer.register_step_pre_hook(lambda *_, weight=weight: gradients.append(weight.grad.clone()))
        loop.run()
        losses.append(record.rows[0]["loss"])
    assert losses[0] == losses[1] == losses[2]
    torch.testing.assert_close(gradients[1], gradients[0] / 4, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradients[2], gradients[0] * 3, rtol=1e-5, atol=1e-7)


def test_samples_are_counted_as_they_are_where_epochs_end_with_a_short_batch():
    loop, record, _ = trainer(total=10, batch_size=24, last_batch="short")  # 24 + 24 + 16 of 64
    loop.run()
    assert [row["samples"] for row in record.rows] == [64 + 24, 2 * 64 + 48, 3 * 64 + 24]
    assert [row["epochs"] for row in record.rows] == [4 / 3, 8 / 3, 10 / 3]


def test_the_schedule_sees_optimizer_steps_from_zero():
    asked = []
    loop, _, _ = trainer(total=5, schedule=lambda k: asked.append(k) or 0.5)
    loop.run()
    assert asked == [0, 1, 2, 3, 4]
    assert {group["lr"] for group in loop.optimizer.param_groups} == {0.5}


def test_steps_that_the_scaler_skips_advance_neither_schedule_nor_phi():
    asked = []
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)

    loop, record, optimizer = trainer(total=12, scaler=scaler, schedule=lambda k: asked.append(k) or 1.0)
    module, steps = loop.module, {3, 4, 9}
    # An infinite gradient in three steps, as fp16 overflow makes it; the loss stays finite.
    module.linear.weight.register_hook(lambda grad: grad * float("inf") if loop.step in steps else grad)
    outcome = loop.run()
    assert outcome.status == "finished"  # overflow under a scaler is everyday, not a divergence
    assert (loop.step, loop.clock) == (12, 9)
    assert asked == [0, 1, 2, 3, 3, 3, 4, 5, 6, 7, 7, 8]
    assert record.rows[-1]["skipped_steps"] == 3
    counters = {float(state["step"]) for state in optimizer.state.values() if "step" in state}
    assert counters == {9.0}
    recorded = {step for columns in record.columns for step in columns["step"]}
    assert recorded == set(range(12)) - steps


@WAITS
def test_an_infinite_gradient_without_a_scaler_is_a_divergence_with_its_place(lag):
    loop, record, _ = trainer(total=12, lag=lag)
    loop.module.linear.bias.register_hook(lambda grad: grad * float("nan") if loop.step == 5 else grad)
    outcome = loop.run()
    assert (outcome.status, outcome.step, outcome.details["layer"]) == ("diverged", 5, "linear.bias")
    assert record.rows[-1]["step"] == 8  # found at the next line: nothing waits for the device in between


@WAITS
def test_hooks_run_in_their_rhythm_and_at_the_end_and_join_the_line(lag):
    seen = []
    hook = Hook(every=3, measure=lambda step: {"extra": seen.append(step) or float(step)})
    loop, record, _ = trainer(total=10, lag=lag, hooks=[hook, Hook(every=0, measure=lambda _step: {"never": 1.0})])
    loop.run()
    assert seen == [3, 6, 9, 10]
    assert [row["step"] for row in record.rows] == [3, 4, 6, 8, 9, 10]
    assert record.rows[0]["extra"] == 3.0
    assert not any("never" in row for row in record.rows)


@WAITS
def test_an_interruption_saves_and_the_loop_goes_on_from_there_bit_for_bit(lag):
    whole, expected, _ = trainer(total=11)
    whole.run()
    loop, first, _ = trainer(total=11, lag=lag, checkpoint=4, interrupted=lambda: loop.step == 6)
    assert loop.run().status == "interrupted"
    assert [step for step, _ in first.saved] == [4, 6]
    again, second, _ = trainer(total=11, lag=lag)
    again.load_state_dict(first.saved[-1][1])
    assert again.run().status == "finished"
    assert torch.equal(again.module.linear.weight, whole.module.linear.weight)
    losses = [(row["step"], row["loss"]) for row in [*first.rows, *second.rows]]
    assert losses == [(row["step"], row["loss"]) for row in expected.rows]


def test_weights_are_kept_at_the_steps_asked_for_and_once():
    kept = []

    def watch(loop):
        loop.rhythm.snapshots = frozenset({0, 5, 11})
        loop.io.snapshot = lambda step, module: kept.append((step, module.linear.weight.detach().clone()))

    whole, _, _ = trainer(total=11)
    start = whole.module.linear.weight.detach().clone()
    watch(whole)
    whole.run()
    assert [step for step, _ in kept] == [0, 5, 11]
    assert torch.equal(kept[0][1], start)
    assert torch.equal(kept[2][1], whole.module.linear.weight)
    halfway = kept[1][1]
    kept.clear()
    loop, first, _ = trainer(total=11, interrupted=lambda: loop.step == 5)
    watch(loop)
    loop.run()
    again, _, _ = trainer(total=11)
    again.load_state_dict(first.saved[-1][1])
    watch(again)
    again.run()
    assert [step for step, _ in kept] == [0, 5, 11]
    assert torch.equal(kept[1][1], halfway)


@pytest.mark.parametrize(
    ("batch", "chunk", "world", "name"),
    [(65, None, 1, "batch_size"), (16, 5, 1, "chunk_size"), (16, None, 3, "batch_size"), (16, 4, 3, "chunk_size")],
)
def test_batches_that_cannot_be_are_refused(batch, chunk, world, name):
    source = ResidentSource(torch.zeros(64, 3, 4, 4, dtype=torch.uint8), torch.zeros(64, dtype=torch.int64))
    with pytest.raises(ValueError, match=f"^{name} must be"):
        Pipeline(
            source, [], seed=0, batch_size=batch, chunk_size=chunk, rank=0, world_size=world,
            device=torch.device("cpu"),
        )  # fmt: skip


def test_a_device_that_waits_for_the_host_is_told_of_once():
    loop, _, _ = trainer()
    said = []
    loop.host_bound = said.append
    for bound in (False, True, True):
        loop._watch_host(bound, 1.0, 10)
    assert said == [100]


@WAITS
def test_an_error_loses_no_line_that_was_begun(lag):
    loop, record, _ = trainer(lag=lag)
    gradient = loop.gradient

    def failing(*arguments):
        if loop.step == 9:
            raise torch.OutOfMemoryError
        return gradient(*arguments)

    loop.gradient = failing
    with pytest.raises(torch.OutOfMemoryError):
        loop.run()
    assert [row["step"] for row in record.rows] == [4, 8]


def test_the_host_is_watched_from_the_second_line_on():
    loop, record, _ = trainer(total=12)
    seen = []
    loop._watch_host = lambda *times: seen.append(times)
    loop.run()
    assert len(record.rows) == 3
    assert [(bound, steps) for bound, _, steps in seen] == [
        (True, 4),
        (True, 4),
    ]  # the CPU has done all that was started


class Device:
    """A device and a host with clocks of their own; a step takes each of them so long, in order."""

    def __init__(self, step, host):
        self.step, self.host = step, host
        self.now = self.free = 0.0  # the host's clock, and when the device has done all that was started

    def start_passes(self):
        self.now += self.host / 2
        self.free = max(self.free, self.now) + self.step

    def start_update(self):
        self.now += self.host / 2

    def moment(self, _device=None):
        device, at = self, max(self.free, self.now)

        class Moment:
            def is_past(self):
                return device.now >= at

            def wait(self):
                device.now = max(device.now, at)

            def since(self, earlier):
                self.wait()
                return at - earlier.at

        made = Moment()
        made.at = at
        return made


@pytest.mark.parametrize(("step", "host", "rate"), [(10, 1, 10), (1, 10, 10), (10, 9, 10)])
@pytest.mark.parametrize("hook", [0, 30])
def test_times_are_those_of_the_steps_whoever_is_slower(monkeypatch, step, host, rate, hook):
    device, told = Device(step, host), []
    monkeypatch.setattr("ssl_bench.training.loop.Moment", device.moment)
    loop, record, _ = trainer(total=60, lag=LAG, hooks=[Hook(hook, lambda _: {"measured": 0})])
    loop.rhythm.log, loop.host_bound = 10, told.append
    gradient, update = loop.gradient, loop._take_step
    loop.gradient = lambda *arguments: device.start_passes() or gradient(*arguments)
    loop._take_step = lambda loss: device.start_update() or update(loss)
    loop.run()
    per_step = [16 / row["images_per_second"] for row in record.rows]
    # At the start and after a hook the device stands still until the host has started a step.
    assert per_step == pytest.approx([rate] * 6, rel=0.11)
    assert told == ([pytest.approx(1000 * host, rel=0.01)] if host > step else [])
    assert record.rows[-1]["seconds"] == pytest.approx(60 * rate, rel=0.05)
