"""A run's backbone to give away: ``ssl-bench export RUN --to DIR [--push OWNER/NAME]``, as timm and the hub load it."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ssl_bench.records.reader import RecordError, RunRecord, read_run
from ssl_bench.records.storage import atomic_file, one_line
from ssl_bench.records.summary import images_looked_at, score
from ssl_bench.records.writer import BACKBONE

# The images that the backbone was trained for: "mean" and "std" of each channel, for pixels in [0, 1], and "size".
About = Mapping[str, Any]

FILES = ("model.safetensors", "config.json", "README.md")


def publish(
    run_dir: str | Path, output: str | Path, about: Callable[[RunRecord], About], *, repo: str | None = None
) -> Path:
    """Writes weights, timm's configuration and a model card.

    `timm.create_model("local-dir:DIR", pretrained=True)` loads the folder, and so does ``hf-hub:`` once it is uploaded.

    Args:
        run_dir: of a run that has a backbone.
        output: the folder: model.safetensors, config.json, README.md; made, or empty, or an earlier copy.
        about: finds the images' mean, std and size where the record does not say them (those of before it did).
        repo: the hub's OWNER/NAME to which the folder will be pushed, for the model card; None = none.

    Returns:
        the folder.

    Raises:
        RecordError: one line; no such run, no backbone in it, one that no timm model is, or a bad name of a repository.
        OSError: one line; a file cannot be written.
    """
    if repo is not None:
        _check_repo(repo)
    record, folder = read_run(run_dir), Path(output)
    weights = record.folder / BACKBONE
    if not weights.is_file():
        raise RecordError(f"export: {run_dir} must hold {BACKBONE}, got a run that is {record.status}")
    if ":" in record.recipe["model"]["name"]:
        name = record.recipe["model"]["name"]
        raise RecordError(f"export: {run_dir} must hold a model of timm's to be loaded by timm, got {name}")
    others = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    if others and not set(FILES).issuperset(others):
        raise RecordError(f"export: {folder} must be empty, new or an earlier export, got {others[0]!r} in it")
    config = _config(weights, record.provenance.get("images") or about(record))
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_file(folder / "model.safetensors", synced=False) as file, open(weights, "rb") as source:
        shutil.copyfileobj(source, file)
    for name, text in (
        ("config.json", json.dumps(config, indent=2) + "\n"),
        ("README.md", _card(record, config, repo)),
    ):
        with atomic_file(folder / name, synced=False) as file:
            file.write(text.encode())
    return folder


def push(folder: Path, repo: str) -> str:
    """Uploads an exported folder to the Hugging Face hub; a repository that does not exist is made, private.

    The endpoint and the token are huggingface_hub's (`HF_ENDPOINT`, `HF_TOKEN`, ``hf auth login``).

    Args:
        folder: what `publish` has written.
        repo: OWNER/NAME.

    Returns:
        the address of the commit.

    Raises:
        RecordError: one line; no network, no token, no right to write, or a bad name.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled

    _check_repo(repo)
    api = HfApi(library_name="ssl_bench")
    try:
        # The reader of a public model should be somebody's decision, and one that the hub's page has a switch for.
        api.create_repo(repo, private=True, exist_ok=True)
        done = api.upload_folder(
            repo_id=repo, folder_path=folder, allow_patterns=list(FILES), commit_message="Upload by ssl-bench export"
        )
    except (HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled, OSError) as error:
        raise RecordError(f"export: {repo}: the upload failed; {folder} has the files: {one_line(error)}") from error
    return str(done.commit_url)


def _check_repo(repo: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
        good = repo.count("/") == 1
    except HFValidationError:
        good = False
    if not good:
        raise RecordError(f"export: --push must be OWNER/NAME as on the hub, got {repo!r}")


def _config(weights: Path, images: About) -> dict[str, Any]:
    """The content of config.json, in timm's layout."""
    try:
        with safe_open(weights, framework="pt") as file:
            spec = json.loads((file.metadata() or {})["ssl_bench"])
    except (SafetensorError, KeyError, ValueError) as error:
        raise RecordError(f"export: {weights}: damaged, or not this suite's: {one_line(error)}") from error
    stem = spec.pop("stem")
    channels, size = spec.pop("in_chans"), images["size"]
    return {
        "architecture": spec.pop("name") + ("" if stem == "imagenet" else f"_{stem}"),
        "num_classes": 0,
        "global_pool": None,
        "model_args": spec,  # img_size and patch_size, where they are not timm's
        "pretrained_cfg": {
            "num_classes": 0,
            "input_size": [channels, size, size],
            "fixed_input_size": "img_size" in spec,
            "interpolation": "bilinear",  # of the reader, to the shorter side, if it resizes at all
            "crop_pct": 1.0,
            "crop_mode": "center",
            "mean": list(images["mean"]),
            "std": list(images["std"]),
        },
    }


def _card(record: RunRecord, config: Mapping[str, Any], repo: str | None = None) -> str:
    """The model card."""
    recipe, cfg = record.recipe, config["pretrained_cfg"]
    method = (recipe.get("method") or {}).get("target") or "supervised classification"
    optimizer = {key: value for key, value in recipe["optimizer"].items() if value is not None}
    length = f"{recipe['steps']} steps" if recipe.get("steps") else f"{recipe['epochs']:g} epochs"
    evaluations = (record.results or {}).get("evaluations", [])
    rows = [
        f"| {one['protocol']} | {one['model']} | {score(one)} | {images_looked_at(one)} | {one.get('seed')} |"
        for one in evaluations
    ]
    needs = "import ssl_bench.models.backbone  # the stem\n" if "_cifar" in config["architecture"] else ""
    place = f"hf-hub:{repo}" if repo else "local-dir:FOLDER"
    table = ["| protocol | model | score | images | probe seed |", "|---|---|---|---|---|", *rows]
    return "\n".join(
        [
            "---",
            "library_name: timm",
            "pipeline_tag: image-feature-extraction",
            "tags: [image-feature-extraction, timm, ssl_bench]",
            "---",
            f"# {config['architecture']}, {method} on {recipe['data']['name']}",
            "",
            f"Trained by ssl_bench (identity `{record.identity}`): {method}, batch size {recipe['batch_size']}, "
            f"{length}, seed {recipe['seed']}, {recipe['precision']}. The run ended as: {record.status}.",
            "",
            "```python",
            f"import timm\n{needs}",
            f'backbone = timm.create_model("{place}", pretrained=True).eval()',
            "```",
            "",
            f"Images of {cfg['input_size'][1]} x {cfg['input_size'][2]} pixels in [0, 1], normalised by mean "
            f"{_numbers(cfg['mean'])} and std {_numbers(cfg['std'])}.",
            "",
            "## Scores",
            "",
            *(table if rows else ["Not evaluated."]),
            "",
            "One run, so without a deviation over training seeds. Untrained: the same protocol before the first step.",
            "",
            "## Limits",
            "",
            f"Trained on {recipe['data']['name']} and evaluated on it; features of other images were not measured. A "
            "backbone without a classifier.",
            "",
            "## Recipe",
            "",
            "```json",
            json.dumps({"optimizer": optimizer, "schedule": recipe["schedule"], "model": recipe["model"]}, indent=2),
            "```",
            "",
        ]
    )


def _numbers(values: list[float]) -> str:
    return f"({', '.join(f'{value:.4f}' for value in values)})"
