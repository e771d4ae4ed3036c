"""From a command line to a recipe: what is composed, what is refused, and how the error reads."""

import json
from pathlib import Path

import pytest

from ssl_bench.data.dataset import DATASETS
from ssl_bench.recipe.compose import build, choices, compose, merge, override
from ssl_bench.recipe.identity import ADDED, NAMED_DATA, differences, flatten, without_additions
from ssl_bench.recipe.values import load_yaml
from ssl_bench.report.recipes import cell_key

RECORDS = Path(__file__).resolve().parents[2] / "results"


def test_defaults_compose_on_both_tracks():
    assert compose("pretrain").method.target == "barlow_twins"
    assert compose("classify").method.target == ""


@pytest.mark.parametrize("track", ["pretrain", "classify"])
@pytest.mark.parametrize("group", ["data", "model", "method", "optimizer", "schedule", "eval", "protocol"])
def test_every_file_of_every_group_composes(track, group):
    names = choices(group)
    assert names
    for name in names if (track, group) != ("classify", "method") else []:
        if (track, name) == ("pretrain", "clars"):
            continue  # of classification alone
        more = {"timm": ["optimizer.name=sgd", "optimizer.lr=1"], "clars_chunks": ["chunk_size=64"]}.get(name, [])
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
        (["lr=1"], r"unknown key 'lr'; did you mean 'optimizer.lr'\? \(known: batch_size, .*data\.\*"),
        (["learning_rate=1"], r"unknown key 'learning_rate'; did you mean 'optimizer.lr'\?"),
        (["foo.bar=1"], r"unknown key 'foo.bar' \(known: data\.\*, model"),
        (["learnin_rate=1"], r"unknown key 'learnin_rate'; did you mean 'optimizer.lr'\?"),
        (["bs=1"], r"unknown key 'bs'; did you mean 'batch_size'\?"),
        (["workers=1"], r"unknown key 'workers'; did you mean 'data.workers'\?"),
        (["steps.x=1"], r"unknown key 'steps.x'; did you mean 'steps'\?"),
        (["averaging=ema"], r"averaging must be given by its keys \(averaging.kind, averaging.decay, .*\), got 'ema'"),
        (["telemetry=5"], r"telemetry must be given by its keys \(telemetry.every\), got 5"),
        (["track=classify"], r"unknown key 'track'"),
        (["metod=byol"], r"unknown key 'metod'; did you mean 'method'\?"),
        (["optimizr=lars"], r"unknown key 'optimizr'; did you mean 'optimizer'\?"),
        (["dataset=digits"], r"unknown key 'dataset'; did you mean 'data'\?"),
        (["backbone=resnet18"], r"unknown key 'backbone'; did you mean 'model'\?"),
        (["protocols=[knn-v1]"], r"unknown key 'protocols'; did you mean 'eval.protocols'\?"),
        (["eval.foo=1"], r"unknown key 'eval.foo' \(known: eval.protocols, "),
        (["optimizer.learning_rate=1"], r"unknown key 'optimizer.learning_rate'; did you mean 'lr'\?"),
        (["max_epochs=1"], r"unknown key 'max_epochs'; did you mean 'epochs'\?"),
        (["batchsize=1"], r"unknown key 'batchsize'; did you mean 'batch_size'\?"),
        (["data.pth=x"], r"unknown key 'data.pth'; did you mean 'data.path'\? \(known: data.name, [^*]*$"),
        (["optimizer=lasr"], r"unknown optimizer 'lasr'; did you mean 'lars'\? \(known: .*tvlars"),
        (["method=simclrr"], r"unknown method 'simclrr'; did you mean 'simclr'\?"),
        (["data=cifar"], r"unknown data 'cifar'; did you mean 'cifar10'\?"),
        (["method=no_such.module:Thing"], r"method 'no_such.module:Thing' cannot be imported: No module named"),
        (["batch_size=many"], r"batch_size must be a valid integer, got 'many'"),
        (["batch_size=0"], r"batch_size must be greater than 0, got 0"),
        (["precision=fp8"], r"precision must be 'fp32', 'bf16' or 'fp16', got 'fp8'"),
        (["optimizer.lr=fast"], r"optimizer.lr must be a valid number, got 'fast'"),
        (["method.projector=[8,x]"], r"method.projector.1 must be a valid integer, got 'x'"),
        (["steps=5", "epochs=1"], r"give epochs or steps, not both"),
        (["steps=null"], r"give exactly one of epochs and steps, got epochs=None and steps=None"),
        (["chunk_size=100"], r"chunk_size must be a divisor of batch_size=512, got 100"),
        (["eval.protocols=[knn]"], r"unknown evaluator 'knn'; did you mean 'knn-v1'\?"),
        (["eval.protocols=[online]"], r"eval.protocols must be evaluators of a finished run, got 'online', a monitor"),
        (["eval.protocols=[a: {b]"], r"eval.protocols=\[a: {b\]: invalid YAML in line 1: "),
        (["optimizer=timm", "optimizer.lr=1"], r"optimizer 'timm' needs optimizer.name \(timm's name of the optimizer"),
        (["method=w_mse", "batch_size=64"], r"w_mse: the batch must have more images than .* 64 dim"),
        (["method=w_mse", "batch_size=96", "method.sub_batch=80"], r"w_mse: sub_batch must divide the batch of 96"),
        (["method=swav", "batch_size=96", "method.queue=100"], r"swav: queue must be a multiple of the batch of 96"),
        (["lonely"], r"cannot read 'lonely': expected key=value"),
        (["augment.crop_scale=[0.5,0.1]"], r"augment.crop_scale must be 0 < low <= high <= 1, got \(0.5, 0.1\)"),
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


def test_differences_are_those_of_the_identity():
    base = compose("pretrain").to_dict()
    asked = compose("pretrain", ["optimizer.lr=3", "steps=5", "data.path=/x", "log_every=7", "optimizer.foreach=true"])
    assert differences(base, asked.to_dict()) == [
        "epochs: the run has 100.0, asked for null",
        "optimizer.lr: the run has 2.0, asked for 3.0",
        "steps: the run has null, asked for 5",
    ]
    old = {key: value for key, value in base.items() if key not in ADDED}  # a record from before they existed
    assert differences(old, base) == []
    assert differences({"seed": 1, "x": {}}, {"seed": 1.0, "x": {}, "y": "nothing"}) == [
        'y: the run has nothing, asked for "nothing"'
    ]
    folders = [compose("pretrain", ["data=folder", f"data.path={name}"]).to_dict() for name in "ab"]
    assert differences(*folders) == ['data.path: the run has "a", asked for "b"']


def test_the_path_counts_for_every_data_set_that_its_name_does_not_settle():
    assert set(DATASETS) - {"hf", "folder", "webdataset"} == NAMED_DATA
    for name in ("hf", "folder", "my_pkg.my_file:locate", "an_entry_points_name"):
        recipes = [{"data": {"name": name, "path": path}} for path in "ab"]
        assert differences(*recipes) == ['data.path: the run has "a", asked for "b"'], name
    assert differences(*({"data": {"name": "cifar10", "path": path}} for path in "ab")) == []


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


@pytest.mark.parametrize(
    "text",
    [
        "/tmp/a b:c/d=e",
        "a: b #c",
        "C:\\new\\x",
        "it's",
        "~/runs",
        "-",
        "...",
        "010",
        "2024-01-01",
        "yes",
        "@x*",
        "${seed}",
        "",
        "123",
        "1e3",
        "true",
        "[1, 2]",
        "{a: b}",
        "C:\\temp\\1",
        "\\\\server\\share",
    ],
)
def test_text_arrives_as_it_is_written(text):
    assert compose("pretrain", [f"run_dir={text}"]).run_dir == text
    if text:
        assert compose("pretrain", [f"run_dir='{text}'"]).run_dir == text


def test_text_is_text_in_every_key_whose_type_is_text():
    recipe = compose("pretrain", ["data=folder", "data.path=true", "data.cache_dir=007", "tracker=1", "run_dir=null"])
    assert (recipe.data.path, recipe.data.cache_dir, recipe.tracker, recipe.run_dir) == ("true", "007", "1", None)
    assert compose("pretrain", ["param_groups.exclude=[1e3, true, 010]"]).param_groups.exclude == ["1e3", "true", "010"]
    with pytest.raises(ValueError, match="unknown optimizer '123'"):  # the text, and not "must be a string"
        compose("pretrain", ["optimizer=timm", "optimizer.name=123", "optimizer.lr=1"])
    assert compose("pretrain", ["data.resident=true"]).data.resident is True
    with pytest.raises(ValueError, match=r"optimizer\.lr must be a valid number, got 'true'|optimizer\.lr"):
        compose("pretrain", ["optimizer.lr=[1]"])
    again = override(recipe.to_dict(), ["data.path=1"], ("data.path",))
    assert again["data"]["path"] == "1"


def test_a_home_directory_is_expanded_where_a_path_is_used(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    recipe = compose("pretrain", ["run_dir=~/runs/a"])
    assert (recipe.run_dir, recipe.folder()) == ("~/runs/a", "/home/me/runs/a")


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("optimizer.lr=1e-4", 1e-4),
        ("method.projector=[8, 16]", [8, 16]),
        ("eval.protocols=['knn-v1', linear-cached-v1]", ["knn-v1", "linear-cached-v1"]),
        ("param_groups.exclude=[*.bn*,'a b',c:d]", ["*.bn*", "a b", "c:d"]),
        ("augment.blur=off", "off"),
        ("compile=on", True),
        ("data.size=null", None),
        ("augment={flip: 0}", 0.0),
    ],
)
def test_values_are_read_as_yaml(override, value):
    flat = flatten(compose("pretrain", [override]).to_dict())
    key = override.partition("=")[0]
    assert flat[key if key in flat else "augment.flip"] == value


def test_a_yaml_file_with_a_key_given_twice_is_refused_with_its_line():
    with pytest.raises(ValueError, match=r'^there: invalid YAML in line 3: found duplicate key "a"$'):
        load_yaml("there", "a: 1\nb: off\na: [1,\n  2]")
    assert load_yaml("there", "{a: off, b: 1e-4}") == {"a": "off", "b": 1e-4}
    load_yaml("there", "[" * 50 + "]" * 50)
    with pytest.raises(ValueError, match=r"^there: YAML must have at most 50 levels, got more$"):
        load_yaml("there", "[" * 51 + "]" * 51)


# Made by the version that composed with Hydra; a recipe's identity never changes, unless its result does on purpose:
# TVLARS(paper) leaves zero tensors where they are since zero_norm="literal"; timm's optimizers have timm's defaults,
# and protocol=paper has the LARS and LAMB that the paper names.
PINNED = {
    "pretrain": "66da5eeef306c871",
    "classify": "9ba4a65a69537d68",
    "pretrain optimizer=tvlars optimizer.variant=paper optimizer.delay_fraction=0.5": "002b26e1c063c43b",
    "pretrain protocol=paper optimizer=tvlars data=tiny_imagenet batch_size=1024": "7740c6551169e009",
    "classify protocol=released optimizer=lamb data=cifar10 batch_size=1024": "40ec13138cea64d7",
    "pretrain protocol=released batch_size=4096 method.divisor=5": "7daf2544347d67b5",
    "pretrain steps=20": "0b14d5e76b0984d8",
    "pretrain optimizer=lars optimizer.lr=1e-4": "dfc1e033a2a944b4",
    "pretrain eval=full": "b63f507a320c5113",
    "pretrain optimizer=timm optimizer.name=adan optimizer.lr=0.01": "e3b09e8405fbddca",
    "pretrain protocol=paper data.name=tiny_imagenet": "aaf24f6662632d77",
    "pretrain augment.blur=off": "66da5eeef306c871",
}


@pytest.mark.parametrize("line", PINNED)
def test_command_lines_keep_their_identity(line):
    track, *overrides = line.split()
    assert compose(track, overrides).identity() == PINNED[line]


def test_later_overrides_replace_a_duration_in_another_unit():
    merged = merge({"epochs": "100", "schedule.warmup_epochs": "20", "seed": "0"}, {"steps": "5"})
    assert merged == {"schedule.warmup_epochs": "20", "seed": "0", "steps": "5"}
    assert merge(merged, {"schedule.warmup_fraction": "0.1"}) == {
        "seed": "0",
        "steps": "5",
        "schedule.warmup_fraction": "0.1",
    }


def test_override_sets_only_what_a_record_allows():
    plain = compose("pretrain").to_dict()
    assert override(plain, ["eval.protocols=[knn-v1]"], ("eval",))["eval"]["protocols"] == ["knn-v1"]
    with pytest.raises(ValueError, match="batch_size is fixed by the run's record"):
        override(plain, ["batch_size=4"], ("eval",))
    with pytest.raises(ValueError, match=r"unknown key 'eval.protocol'; did you mean 'eval.protocols'\?"):
        override(plain, ["eval.protocol=x"], ("eval",))
    with pytest.raises(ValueError, match="cannot choose data=digits for a recorded run"):
        override(plain, ["data=digits"], ("data.path",))
    assert flatten(plain) == flatten(compose("pretrain").to_dict())


def test_nothing_is_suggested_in_its_own_place():
    from ssl_bench.recipe.compose import known_keys, unknown_key

    for name in ("data", "eval", "optimizer", "steps", "data.name", "eval.data", *known_keys()):
        assert f"did you mean {name!r}?" not in unknown_key(name)


@pytest.mark.parametrize("words", [["epochs=null", "steps=6"], ["steps=6", "epochs=null"]])
def test_a_length_that_is_given_as_null_is_not_given(words):
    recipe = compose("pretrain", words)
    assert (recipe.steps, recipe.epochs) == (6, None)
