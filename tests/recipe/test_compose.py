"""From words to a recipe: what is composed, what is refused, and with which words."""

import json
from pathlib import Path

import pytest

from ssl_bench.recipe.compose import build, choices, compose, override
from ssl_bench.recipe.schema import ADDED, flatten, without_additions
from ssl_bench.report.aggregate import cell_key

RECORDS = Path(__file__).resolve().parents[2] / "results"


def test_defaults_compose_on_both_tracks():
    assert compose("pretrain").method.target == "barlow_twins"
    assert compose("classify").method.target == ""


@pytest.mark.parametrize("track", ["pretrain", "classify"])
@pytest.mark.parametrize("group", ["data", "model", "method", "optimizer", "schedule", "eval", "protocol"])
def test_every_file_of_every_group_composes(track, group):
    names = [name for name in choices(group) if name != "plugin"]
    assert names
    for name in names if (track, group) != ("classify", "method") else []:
        more = ["optimizer.name=sgd", "optimizer.lr=1"] if (group, name) == ("optimizer", "timm") else []
        compose(track, [f"{group}={name}", *more])


def test_command_line_has_the_last_word_over_groups_and_protocols():
    recipe = compose("pretrain", ["optimizer=tvlars", "optimizer.lr=3", "model.stem=imagenet", "protocol=fair"])
    assert (recipe.optimizer.options["lr"], recipe.model.stem) == (3.0, "imagenet")
    assert recipe.schedule.target == "constant"  # TVLARS carries its own phi
    assert compose("pretrain", ["optimizer=tvlars", "schedule=polynomial"]).schedule.target == "polynomial"


def test_a_protocols_rules_hold_where_their_conditions_do():
    assert compose("pretrain", ["protocol=paper", "data=tiny_imagenet"]).model.name == "resnet34"
    assert compose("pretrain", ["protocol=paper", "data=cifar10"]).model.name == "resnet18"
    warm = compose("pretrain", ["protocol=paper", "optimizer=lars"]).schedule.options
    assert warm["warmup_epochs"] == 20
    assert "warmup_fraction" not in warm
    assert compose("pretrain", ["protocol=paper", "schedule.warmup_steps=7"]).schedule.options["warmup_steps"] == 7


def test_a_duration_in_one_unit_replaces_the_files_other_unit():
    recipe = compose("pretrain", ["steps=20", "schedule.warmup_epochs=3"])
    assert (recipe.steps, recipe.epochs) == (20, None)
    assert recipe.schedule.options["warmup_epochs"] == 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["optimzer.lr=1"], r"unknown key 'optimzer.lr'"),
        (["optimizer.etaa=1"], r"unknown key 'optimizer.etaa'; did you mean 'eta'\?"),
        (["batchsize=1"], r"unknown key 'batchsize'; did you mean 'batch_size'\?"),
        (["data.pth=x"], r"unknown key 'data.pth'; did you mean 'data.path'\?"),
        (["optimizer=lasr"], r"unknown optimizer 'lasr'; did you mean 'lars'\? \(known: .*tvlars"),
        (["method=simclrr"], r"unknown method 'simclrr'; did you mean 'simclr'\?"),
        (["data=cifar"], r"unknown data 'cifar'; did you mean 'cifar10'\?"),
        (["method=no_such.module:Thing"], r"method 'no_such.module:Thing' cannot be imported: No module named"),
        (["batch_size=many"], r"batch_size: got 'many', allowed: a valid integer"),
        (["batch_size=0"], r"batch_size: got 0, allowed: greater than 0"),
        (["precision=fp8"], r"precision: got 'fp8', allowed: 'fp32', 'bf16' or 'fp16'"),
        (["optimizer.lr=fast"], r"optimizer.lr: got 'fast', allowed: a valid number"),
        (["method.projector=[8,x]"], r"method.projector.1: got 'x', allowed: a valid integer"),
        (["steps=5", "epochs=1"], r"give epochs or steps, not both"),
        (["steps=null"], r"give exactly one of epochs and steps"),
        (["chunk_size=100"], r"chunk_size: got 100, allowed: a divisor of batch_size=512"),
        (["eval.protocols=[knn]"], r"knn.*knn-v1"),
        (["lonely"], r"cannot read 'lonely': expected key=value"),
        (["augment.crop_scale=[0.5,0.1]"], r"augment.crop_scale: got \(0.5, 0.1\), allowed: 0 < low <= high <= 1"),
    ],
)
def test_what_is_wrong_is_refused_in_one_line_that_names_it(words, message):
    with pytest.raises(ValueError, match=message) as caught:
        compose("pretrain", words)
    assert "\n" not in str(caught.value)


def test_a_recorded_recipe_builds_again_to_the_same_identity():
    for words in ([], ["optimizer=tvlars", "optimizer.variant=paper", "steps=9"], ["method=vicreg", "optimizer=lamb"]):
        recipe = compose("pretrain", words)
        again = build("pretrain", recipe.to_dict())
        assert again == recipe
        assert again.identity() == recipe.identity()


def test_identity_ignores_what_cannot_change_the_result_and_sees_what_can():
    base = compose("pretrain").identity()
    for same in ("run_dir=x", "data.path=/elsewhere", "data.workers=7", "log_every=3", "device=cpu", "resume=auto"):
        assert compose("pretrain", [same]).identity() == base
    for other in ("seed=1", "optimizer.lr=2.5", "batch_size=256", "chunk_size=64", "precision=bf16", "epochs=101"):
        assert compose("pretrain", [other]).identity() != base
    folder = compose("pretrain", ["data=folder", "data.path=a"]).identity()
    assert compose("pretrain", ["data=folder", "data.path=b"]).identity() != folder


def recorded() -> list[dict]:
    """The runs of the committed records, made before any key of `ADDED` existed."""
    return [run for path in sorted(RECORDS.glob("*.json")) for run in json.loads(path.read_text()).get("runs", [])]


def test_recorded_experiments_keep_their_identity_and_their_cell():
    runs = [run for run in recorded() if not set(ADDED) & set(flatten(run["recipe"]))]
    assert len(runs) >= 3
    for run in runs:
        recipe = build(run["recipe"]["track"], run["recipe"])
        assert recipe.identity() == run["identity"]
        # A record of today holds the new keys and belongs beside the old one, in a report as well.
        assert set(flatten(recipe.to_dict())) > set(flatten(run["recipe"]))
        assert cell_key(recipe.to_dict()) == cell_key(run["recipe"])


def test_a_key_added_later_is_part_of_the_identity_as_soon_as_it_says_something():
    base = compose("pretrain")
    assert {name: flatten(base.to_dict())[name] for name in ADDED} == ADDED  # the values are the defaults
    for word in ("loss_scale=0.5", "sync_batch_norm=false", "last_batch=short", "method.divisor=512"):
        other = compose("pretrain", [word])
        assert other.identity() != base.identity()
        assert cell_key(other.to_dict()) != cell_key(base.to_dict())
    assert without_additions({"loss_scale": 1.0, "seed": 0}) == {"seed": 0}
    assert without_additions({"loss_scale": 2.0, "seed": 0}) == {"loss_scale": 2.0, "seed": 0}


def test_the_released_code_is_composed_with_its_faults():
    pretrain = compose("pretrain", ["protocol=released", "batch_size=1024", "epochs=1000"])
    assert (pretrain.loss_scale, pretrain.last_batch, pretrain.sync_batch_norm) == (0.25, "short", True)
    assert pretrain.method.options == {"projector": (4096, 4096, 4096), "lambd": 0.005, "divisor": 1024}
    assert pretrain.schedule.target == "released_warmup_cosine"
    assert {"schedule_epochs": 100, "warmup_epochs": 20}.items() <= pretrain.schedule.options.items()
    classify = compose("classify", ["protocol=released", "optimizer=lamb"])
    assert (classify.loss_scale, classify.last_batch, classify.sync_batch_norm) == (1, "short", False)
    assert classify.schedule.target == "warmup_cosine"
    assert classify.optimizer.options["trust_ratio"] == "norms"
    assert compose("pretrain", ["protocol=released", "optimizer=lamb"]).optimizer.options["trust_ratio"] == "one"
    simclr = compose("pretrain", ["protocol=released", "method=simclr"])
    assert (simclr.loss_scale, "divisor" in simclr.method.options) == (1, False)
    for protocol in ("fair", "paper"):
        flat = flatten(compose("pretrain", [f"protocol={protocol}"]).to_dict())
        assert not set(ADDED) & set(without_additions(flat))


def test_values_with_spaces_and_colons_arrive_whole():
    assert compose("pretrain", ["run_dir=/tmp/a b:c/d=e"]).run_dir == "/tmp/a b:c/d=e"


def test_override_sets_only_what_a_record_allows():
    plain = compose("pretrain").to_dict()
    assert override(plain, ["eval.protocols=[knn-v1]"], ("eval",))["eval"]["protocols"] == ["knn-v1"]
    with pytest.raises(ValueError, match="batch_size is fixed by the run's record"):
        override(plain, ["batch_size=4"], ("eval",))
    with pytest.raises(ValueError, match=r"unknown key 'eval.protocol'"):
        override(plain, ["eval.protocol=x"], ("eval",))
    assert flatten(plain) == flatten(compose("pretrain").to_dict())
