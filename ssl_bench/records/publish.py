"""A run's backbone to give away: ``ssl-bench export RUN --to DIR`` writes what timm and the Hugging Face hub load."""

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


def publish(run_dir: str | Path, output: str | Path, about: Callable[[RunRecord], About]) -> Path:
    """Writes weights, timm's configuration and a model card.

    `timm.create_model("local-dir:DIR", pretrained=True)` loads the folder, and so does ``hf-hub:`` once it is uploaded.

    Args:
        run_dir: of a run that has a backbone.
        output: the folder: model.safetensors, config.json, README.md; made, or empty, or an earlier copy.
        about: finds the images' mean, std and size where the record does not say them (those of before it did).

    Returns:
        the folder.

    Raises:
        RecordError: one line; no such run, no backbone in it, or one that no timm model is.
        OSError: one line; a file cannot be written.
    """
    record, folder = read_run(run_dir), Path(output)
    weights = record.folder / BACKBONE
    if not weights.is_file():
        raise RecordError(f"export: {run_dir} must hold {BACKBONE}, got a run that is {record.status}")
    if ":" in record.recipe["model"]["name"]:
        name = record.recipe["model"]["name"]
        raise RecordError(f"export: {run_dir} must hold a model of timm's to be loaded by timm, got {name}")
    others = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    if others and not {"model.safetensors", "config.json", "README.md"}.issuperset(others):
        raise RecordError(f"export: {folder} must be empty, new or an earlier export, got {others[0]!r} in it")
    config = _config(weights, record.provenance.get("images") or about(record))
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_file(folder / "model.safetensors", synced=False) as file, open(weights, "rb") as source:
        shutil.copyfileobj(source, file)
    for name, text in (("config.json", json.dumps(config, indent=2) + "\n"), ("README.md", _card(record, config))):
        with atomic_file(folder / name, synced=False) as file:
            file.write(text.encode())
    return folder


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


def _card(record: RunRecord, config: Mapping[str, Any]) -> str:
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
            'backbone = timm.create_model("local-dir:FOLDER", pretrained=True).eval()',
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
