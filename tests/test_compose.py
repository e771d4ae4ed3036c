"""From words to a recipe: what is composed, what is refused, and with which words."""

import pytest

from ssl_bench.compose import build, choices, compose, override
from ssl_bench.recipe import flatten


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
