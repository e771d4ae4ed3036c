"""Where a network is measured and kept, if not where it is trained: Schedule-Free, SPlus, averages of the weights."""

import copy
import json
from pathlib import Path

import pytest
import pytorch_optimizer
import torch
from accelerate import Accelerator
from commands import TINY
from safetensors.torch import load_file
from small_classifier import SmallClassifier, small_batches

from ssl_bench import classify
from ssl_bench.optim import Telemetry, WeightAverage, sgd
from ssl_bench.recipe.compose import compose
from ssl_bench.training.evaluation_point import evaluation_point
from ssl_bench.training.gradient import compute_gradient
from ssl_bench.training.loop import Hook, Trainer
from ssl_bench.training.plan import Rhythm


class Silent:
    """A `RunIO` that keeps snapshots."""

    def __init__(self):
        self.snapshots, self.saved = {}, {}

    def snapshot(self, step, module):
        self.snapshots[step] = {name: t.clone() for name, t in module.state_dict().items()}

    def should_stop(self, _step):
        return False

    def nothing(self, *_):
        pass

    def save(self, step, state):
        self.saved[step] = copy.deepcopy(state)

    log = log_telemetry = progress = nothing


def averaged(params):
    optimizer = sgd(params, lr=0.5)
    WeightAverage(optimizer, "mean")
    return optimizer


MAKERS = {
    "schedule_free": lambda p: pytorch_optimizer.ScheduleFreeSGD(p, lr=0.5),
    "splus": lambda p: pytorch_optimizer.SPlus(p, lr=0.5, ema_rate=0.9),
    "average": averaged,
}
EVERY = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())


def trainer(make, every, measure, snapshots=(), checkpoint=0):
    batches = small_batches(batch_size=16)
    accelerator, task = Accelerator(cpu=True), SmallClassifier()
    optimizer = make(task.parameters())
    optimizer.train()
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    model, wrapped = accelerator.prepare(task, optimizer)
    built = Trainer(
        model=model, optimizer=wrapped, schedule=lambda _k: 1.0, gradient=compute_gradient, pipeline=batches,
        rhythm=Rhythm(12, 4, checkpoint, 0, frozenset(snapshots)), accelerator=accelerator, io=Silent(),
        telemetry=Telemetry(optimizer, every=0), hooks=[Hook(every, lambda step: measure(built, step))],
        evaluation_point=evaluation_point(optimizer, task, batches, accelerator.autocast),
    )  # fmt: skip
    return built


def state(module):
    return {name: t.clone() for name, t in module.state_dict().items()}


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


def nothing(_trainer, _step):
    return {}


@EVERY
def test_what_is_measured_is_the_evaluation_point_and_training_is_not_touched(make):
    seen = {}

    def measure(built, step):
        seen[step] = state(built.module)
        return {}

    looked = trainer(make, 1, measure, snapshots=(0, 3, 12))
    start = state(looked.module)
    looked.run()
    plain = trainer(make, 0, nothing)
    plain.run()
    assert same(state(looked.module), state(plain.module))  # bit for bit, running statistics included
    assert same(looked.io.snapshots[0], start)
    assert same(looked.io.snapshots[3], seen[3])
    assert not same(seen[12], state(plain.module))
    # By the optimizer's own word, on a network that trained without any visit.
    inner = getattr(plain.optimizer, "optimizer", plain.optimizer)
    inner.eval()
    for name, p in plain.module.named_parameters():
        assert torch.equal(seen[12][name], p), name


@EVERY
def test_a_run_that_continues_ends_at_the_same_point(make):
    whole = trainer(make, 3, nothing, checkpoint=5)
    whole.run()
    again = trainer(make, 3, nothing)
    again.load_state_dict(whole.io.saved[5])
    again.run()
    assert same(state(whole.module), state(again.module))
    for built in (whole, again):
        built.evaluation_point(12).__enter__()
    assert same(state(whole.module), state(again.module))


@EVERY
def test_batch_norm_has_the_statistics_of_the_evaluation_point(make):
    built = trainer(make, 0, nothing)
    built.run()
    with built.evaluation_point(12):
        module = built.module
        norm = module.net[2]
        inputs = [batch.views(0)[0] for batch in built.pipeline.batches(0, 12)]  # 192 of the 10,000 images: all of them
        hidden = [module.net[1](x.flatten(1)) for x in inputs]
        torch.testing.assert_close(norm.running_mean, torch.stack([h.mean(0) for h in hidden]).mean(0))
        torch.testing.assert_close(norm.running_var, torch.stack([h.var(0) for h in hidden]).mean(0))
        assert norm.momentum is None or norm.momentum == 0.1
        assert module.training
    assert norm.momentum == 0.1


def test_most_optimizers_are_measured_where_they_train():
    built = trainer(lambda p: averaged(p), 0, nothing)
    plain = sgd(built.module.parameters(), lr=1.0)
    where = evaluation_point(plain, built.module, built.pipeline, built.accelerator.autocast)
    before = state(built.module)
    with where(5):
        assert same(before, state(built.module))


def run(folder: Path, *words: str) -> dict:
    """A real run of classification; returns its results."""
    words = (*TINY, "optimizer.lr=3", "schedule=tiny_net:constant_schedule", f"run_dir={folder}", *words)
    assert classify.main([*words, "steps=6", "param_groups.lr_1d=0.1"]) == 0
    return json.loads((folder / "results.json").read_text())


def test_a_run_saves_and_evaluates_its_average_and_says_so(tmp_path):
    every = "checkpoint.snapshots=[0.1667,0.3333,0.5,0.6667,0.8333,1]"
    run(tmp_path / "plain", every)
    results = run(
        tmp_path / "mean", "averaging.kind=mean", "averaging.start_fraction=0.5", "eval.test_every_epochs=0.1"
    )
    weights = [load_file(p) for p in sorted((tmp_path / "plain" / "snapshots").iterdir())]
    saved = load_file(tmp_path / "mean" / "backbone.safetensors")
    assert len(weights) == 6
    for name, tensor in saved.items():
        if name.endswith(("weight", "bias")):
            expected = torch.stack([snapshot[f"backbone.{name}"] for snapshot in weights[3:]]).mean(0)
            torch.testing.assert_close(tensor, expected)
    lines = [
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("plain", "mean")
    ]
    assert [row["loss"] for row in lines[0]] == [row["loss"] for row in lines[1]]  # training is the same
    last = next(entry for entry in results["evaluations"] if entry["model"] == "trained")
    assert last["metrics"]["top1"] == lines[1][-1]["test_top1"]
    head = json.loads((tmp_path / "mean" / "run.json").read_text())
    assert head["recipe"]["averaging"] == {"kind": "mean", "decay": 0.999, "start_fraction": 0.5}
    assert head["evaluated_weights"].startswith("the optimizer's evaluation point")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["optimizer=schedule_free", "schedule=warmup_cosine"],
            "schedule must be constant with optimizer=pytorch_optimizer:ScheduleFreeAdamW, which averages .* got warm",
        ),
        (["optimizer=splus", "schedule=polynomial"], "schedule must be constant with optimizer=pytorch_optimizer:SPl"),
        (["optimizer=splus", "averaging.kind=ema"], "averaging.kind must be none with optimizer=pytorch_optimizer:SPl"),
        (["averaging.decay=0.9"], "averaging.decay must be 0.999 without averaging.kind=ema, got 0.9"),
        (["averaging.start_fraction=0.9"], "averaging.start_fraction must be 0 with averaging.kind=none, got 0.9"),
        (
            ["optimizer=torch.optim:LBFGS"],
            r"optimizer 'torch.optim:LBFGS' must step from the gradients alone \(no closure, no second-order",
        ),
        (
            ["optimizer=pytorch_optimizer:AdaHessian"],
            "AdaHessian' must step from the gradients alone",
        ),
        (["optimizer=pytorch_optimizer:LOMO"], "'pytorch_optimizer:LOMO' must take parameters, got one that takes the"),
        (["optimizer=torch.optim:SGD", "optimizer.momentum=-1"], "optimizer 'torch.optim:SGD' cannot be made: ValueE"),
    ],
)
def test_what_the_loop_cannot_serve_is_refused_in_one_line_before_data_is_read(words, message):
    with pytest.raises(ValueError, match=message) as caught:
        compose("pretrain", [*words, "optimizer.lr=0.1"])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["muon", "soap", "larc", "nesterov", "schedule_free", "splus"])
def test_every_comparator_trains_a_real_run(name, tmp_path):
    words = [word for word in TINY if not word.startswith("optimizer")]
    words += [f"optimizer={name}", f"run_dir={tmp_path / name}", "schedule=tiny_net:constant_schedule"]
    words += ["schedule=constant"] if name in ("schedule_free", "splus") else []
    assert classify.main([*words, "steps=3"]) == 0
    assert json.loads((tmp_path / name / "results.json").read_text())["status"] in ("finished", "at chance")


def test_schedule_free_and_splus_are_chosen_with_a_constant_schedule():
    for name in ("schedule_free", "splus"):
        assert compose("classify", [f"optimizer={name}"]).schedule.target == "constant"
