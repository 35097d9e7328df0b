# SPDX-License-Identifier: Apache-2.0
"""The model card of a run: README.md in its folder, written from the files beside it and nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mio_ext.encoder import TIMM, WIDTH, has_fixed_size, read_metadata
from train.probes import NEIGHBOURS
from train.run_folder import (
    CARD,
    CONFIG,
    COSINE_PLOT,
    EMBEDDING_PLOT,
    ENCODER,
    LOG,
    LOSS_PLOT,
    RESULTS,
    read_log,
    write_atomically,
)

OBJECTIVES = {
    "mio": ("MIO", "https://arxiv.org/abs/2111.12664"),
    "simclr": ("NT-Xent (SimCLR)", "https://arxiv.org/abs/2002.05709"),
    "sigclr": ("SigCLR", "https://arxiv.org/abs/2410.17427"),
    "siglip": ("the sigmoid loss of SigLIP", "https://arxiv.org/abs/2303.15343"),
}
CAPTIONS = {
    LOSS_PLOT: "Loss and mean cosines over the steps",
    COSINE_PLOT: "Cosines of two views of one test image (positive) and of two images (negative)",
    EMBEDDING_PLOT: "t-SNE of the features of test images",
}


def write_card(folder: Path) -> None:
    """Needs the run's log and exported encoder; results, evaluations and plots are shown if they are there."""
    card = model_card(folder)
    write_atomically(folder / CARD, lambda path: path.write_text(card, encoding="utf-8"))


def model_card(folder: Path) -> str:
    # A log that was lost begins with the run's resumption, which says the same.
    start = next(entry for entry in read_log(folder / LOG) if entry["event"] in ("start", "resume"))
    about, config = read_metadata(folder / ENCODER), start["config"]
    name, source = OBJECTIVES[config["objective"]]
    library, _, network = about["backbone"].rpartition(":")
    library = library or "torchvision"
    front_matter = ["---", f"library_name: {library}", f"tags: [self-supervised, {network}]", "---"]
    network = network if library == "timm" else network.replace("resnet", "ResNet-")
    title = f"# {network}, pre-trained on {start['data']} with {name}"
    what = (
        f"An image encoder trained without labels on {start['images']:,} images: two random views of an image are to "
        f"be recognised as such among all pairs of a batch ([{name}]({source})). It gives features, not classes."
    )
    sections = [
        "\n".join(front_matter),
        title,
        what,
        use(about),
        results(folder),
        training(about, start, config),
        pictures(folder),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def use(about: dict[str, Any]) -> str:
    channels, size = about["channels"], about["image_size"]
    text = f"""## Use

```python
from mio_ext.encoder import load_encoder

encoder = load_encoder("{ENCODER}")
features = encoder.features(images)  # [B, {channels}, {size}, {size}], uint8 or float in [0, 1]
```

Mean {numbers(about["mean"])} and standard deviation {numbers(about["std"])} of the scale [0, 1], the stem and the image
size are in the file's metadata."""
    if about.get("width", WIDTH) != WIDTH:  # nothing that torchvision's constructor makes
        return text
    return f"""{text} The keys are {"timm" if about["backbone"].startswith(TIMM) else "torchvision"}'s:

```python
{network_code(about)}
network.load_state_dict(safetensors.torch.load_file("{ENCODER}"))
network.eval()  # its input: (images - mean) / std
```"""


def network_code(about: dict[str, Any]) -> str:
    """The network without mio_ext, in lines of Python."""
    name, channels, size, padding = (about[key] for key in ("backbone", "channels", "image_size", "stem_padding"))
    if name.startswith(TIMM):
        fixed = f", img_size={size}" if has_fixed_size(name) else ""
        return f'network = timm.create_model("{name.removeprefix(TIMM)}", num_classes=0, in_chans={channels}{fixed})'
    text = f"network = torchvision.models.{name}()\n"
    if about["stem"] == "3x3":
        text += f"network.conv1 = torch.nn.Conv2d({channels}, 64, kernel_size=3, padding={int(padding)}, bias=False)\n"
        text += "network.maxpool = torch.nn.Identity()\n"
    elif channels != 3:
        text += f"network.conv1 = torch.nn.Conv2d({channels}, 64, kernel_size=7, stride=2, padding=3, bias=False)\n"
    return text + "network.fc = torch.nn.Identity()"


def numbers(values: list[float]) -> str:
    return ", ".join(f"{value:.4f}" for value in values)


def results(folder: Path) -> str:
    """The table of the run's end, then one line per evaluation that train/evaluate.py has left."""
    lines = []
    if (folder / RESULTS).is_file():
        rows = json.loads((folder / RESULTS).read_text(encoding="utf-8"))["rows"]
        lines += score_table(rows)
    evaluations = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("evaluation-*.json"))]
    if evaluations:
        lines += ["", "| protocol of train/evaluate.py | accuracy in % |", "|---|---|"]
    for entry in evaluations:
        score = next(entry[key] for key in ("accuracy", "linear_all", "knn") if key in entry)
        labels = f", {100 * entry['labels']:g} % of the labels" if entry["labels"] < 1 else ""
        lines.append(f"| {entry['protocol']}{labels} | {score:.2f} |")
    if not lines:
        return ""
    intro = "Accuracy in % on the test split, which was not trained on; columns n/class: that many labels a class."
    return "\n".join(["## Results", "", intro, "", *lines])


def score_table(rows: dict[str, dict[str, float]]) -> list[str]:
    keys = list(dict.fromkeys(key for row in rows.values() for key in row if not key.endswith("_std")))
    names = {"linear_all": "linear, all labels", "knn": f"{NEIGHBOURS}-NN"}
    header = [names.get(key) or f"linear, {key.removeprefix('linear_')}/class" for key in keys]

    def cell(row: dict[str, float], key: str) -> str:
        spread = f" ± {row[f'{key}_std']:.1f}" if f"{key}_std" in row else ""
        return f"{row[key]:.1f}{spread}" if key in row else "–"

    body = [f"| {name} | " + " | ".join(cell(row, key) for key in keys) + " |" for name, row in rows.items()]
    return ["| encoder | " + " | ".join(header) + " |", "|---|" + "---|" * len(keys), *body]


def training(about: dict[str, Any], start: dict[str, Any], config: dict[str, Any]) -> str:
    width = f", first stage {config['width']} wide" if config.get("width", WIDTH) != WIDTH else ""
    options = {
        "loss": f"{OBJECTIVES[config['objective']][0]}, temperature {config['temperature']}",
        "network": f"{about['backbone']}, {about['stem']} stem{width}, projector {config['projector']}",
        "images": f"{about['image_size']} pixels, {about['channels']} channel(s)",
        "length": f"{config['epochs']} epochs of batches of {config['batch_size']} images, "
        f"{config.get('views', 2)} views each",
        "optimizer": f"{config['optimizer']}, learning rate {config['learning_rate']}, "
        f"weight decay {config['weight_decay']}",
        "seed": config["seed"],
    }
    if config["objective"] in ("mio", "sigclr"):
        options["loss"] += f", regulariser {config['regularizer']}"
        if config.get("bias"):
            options["loss"] += f", bias {config['bias']}"
        if config.get("negative_weight", 1.0) != 1:
            options["loss"] += f", weight of the negatives {config['negative_weight']:g}"
    rows = [f"| {key} | {value} |" for key, value in options.items()]
    versions = ", ".join(f"{key} {value}" for key, value in start["versions"].items())
    return "\n".join(
        ["## Training", "", "| | |", "|---|---|", *rows, "", f"All options: [{CONFIG}]({CONFIG}). Run on {versions}."]
    )


def pictures(folder: Path) -> str:
    return "\n\n".join(f"![{caption}]({name})" for name, caption in CAPTIONS.items() if (folder / name).is_file())
