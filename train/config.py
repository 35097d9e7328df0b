# SPDX-License-Identifier: Apache-2.0
"""The options of a pre-training run: one table, from which the command line, the presets and the checks come.

Precedence, lowest first: the defaults below, what ``presets/datasets.toml`` says of the data set, the preset,
``--config FILE``, the command line.
"""

from __future__ import annotations

import json
import math
import os
import tomllib
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from mio_ext.encoder import TIMM, WIDTH
from train.augment import ViewRanges
from train.errors import UserError
from train.run_folder import CHECKPOINT

RESNETS = ("resnet18", "resnet34", "resnet50")
OBJECTIVES = ("mio", "simclr", "siglip", "sigclr")
BACKENDS = ("auto", "cpu", "cuda", "triton", "reference")


def option(
    group: str,
    default: Any,
    help: str,
    *,
    least: float | None = None,
    most: float = math.inf,
    above: float | None = None,
    choices: Sequence[str] = (),
    metavar: str | None = None,
) -> Any:
    """A field of :class:`Config`: ``least`` and ``most`` are allowed values, ``above`` is not."""
    limits = {"least": least, "most": most, "above": above, "choices": tuple(choices)}
    return field(default=default, metadata={"group": group, "help": help, "metavar": metavar, **limits})


@dataclass(frozen=True)
class Config:
    """Everything that decides what a run computes, and (group "run") where and how it does so."""

    data: str = option("data", "digits", "digits, cifar10, cifar100, stl10 or folder:PATH")
    data_root: str = option("run", "data", "where data sets and decoded folders are kept", metavar="DIR")
    download: bool = option("run", False, "fetch the official files of the data set if they are missing")
    # Below 8 pixels the ResNet puts a 3x3 filter of stride 2 on a 1x1 map, whose weight gradient in
    # bfloat16 on the CPU holds uninitialised memory (seen in torch 2.14.1).
    image_size: int | None = option(
        "data", None, "pixels per side that the network sees; none: the data's own", least=8
    )

    subset: float = option("data", 1.0, "share of the images that pre-training sees, a fixed choice", above=0, most=1)

    epochs: int = option("optimisation", 200, "passes over the images", least=1)
    batch_size: int = option(
        "optimisation",
        512,
        "images per step over all processes, --views of each; all their pairs are in the loss",
        least=2,
    )
    micro_batch_size: int | None = option(
        "optimisation",
        None,
        "images of a process that the encoder and its batch norm see at a time, for memory; none: all",
        least=2,
    )
    optimizer: str = option("optimisation", "sgd", "what updates the weights", choices=("sgd", "lars", "adamw"))
    learning_rate: float = option("optimisation", 0.5, "peak, after the warm-up", above=0)
    warmup_epochs: float = option("optimisation", 5.0, "linear warm-up, then cosine to 0", least=0)
    schedule_epochs: int | None = option("optimisation", None, "where the cosine ends; none: with the run", least=1)
    schedule_by: str = option(
        "optimisation", "step", "what changes the learning rate: every step, or every epoch, as mio-v1",
        choices=("step", "epoch"),
    )  # fmt: skip
    momentum: float = option("optimisation", 0.9, "of SGD and LARS; beta1 of AdamW", least=0, most=1)
    weight_decay: float = option("optimisation", 5e-4, "not on biases and batch norm", least=0)
    decay_shortcuts: bool = option("optimisation", False, "weight decay on the shortcuts' batch norm too, as mio-v1")
    precision: str = option(
        "optimisation",
        "auto",
        "auto: bfloat16 autocast where the hardware multiplies it",
        choices=("auto", "float32", "bfloat16"),
    )

    objective: str = option("loss", "mio", "what is minimised", choices=OBJECTIVES)
    temperature: float = option("loss", 0.5, "tau of positive and negative pairs", above=0)
    negative_temperature: float | None = option("loss", None, "tau of negative pairs; none: the same", above=0)
    negative_weight: float = option(
        "loss", 1.0, "omega of mio, on the mean over negative pairs; sigclr is mio with N - 2 times as much", least=0
    )
    regularizer: float = option("loss", 1.0, "lambda of mio, weight of the squared distance", least=0)
    bias: float = option("loss", 0.0, "added to every logit, not of simclr")
    views: int = option(
        "loss", 2, "views of an image per step, an even number, all of them positive pairs; mio and sigclr", least=2
    )
    learn_scale: bool = option("loss", False, "learn temperature and bias with the model, not of simclr")
    learn_bias: bool = option("loss", False, "learn the bias with the model, at a fixed temperature; not of simclr")
    scale_learning_rate: float | None = option(
        "optimisation", None, "peak for a learnt temperature and bias; none: --learning-rate", above=0
    )
    loss_backend: str = option("run", "auto", "what computes the loss", choices=BACKENDS)

    backbone: str = option("model", "resnet18", f"torchvision's {', '.join(RESNETS)}, or timm:NAME, a ViT say")
    width: int = option("model", WIDTH, "a ResNet's first stage, doubled three times; 64: torchvision's", least=1)
    stem: str = option(
        "model",
        "auto",
        "3x3: stride 1, no max-pool; 7x7: stride 2 and max-pool; auto: 3x3 up to 64 pixels",
        choices=("auto", "3x3", "7x7"),
    )
    stem_padding: bool = option("model", True, "pad the 3x3 stem; without it 32 pixels become 30, as mio-v1")
    projector: tuple[int, ...] = option("model", (2048, 128), "widths of its layers, the embedding last", least=1)
    forward: str = option(
        "model",
        "fused",
        "fused: batch norm sees both views at once; separate: one view after the other",
        choices=("fused", "separate"),
    )

    crop_area: tuple[float, float] = option(
        "views", ViewRanges.crop_area, "crop, as a share of the image's area", above=0
    )
    crop_aspect: float = option("views", ViewRanges.crop_aspect, "aspect ratio in [1/x, x]", least=1)
    flip: float = option("views", ViewRanges.flip, "probability of a horizontal flip", least=0, most=1)
    rotation: float = option("views", ViewRanges.rotation, "degrees either way", least=0, most=180)
    shear: float = option("views", ViewRanges.shear, "degrees along x either way", least=0, most=60)
    gamma: float = option("views", ViewRanges.gamma, "exponent on the intensity in [1/x, x]", least=1)
    jitter: float = option("views", ViewRanges.jitter, "probability of the colour jitter", least=0, most=1)
    brightness: float = option("views", ViewRanges.brightness, "factor in [1 - x, 1 + x]", least=0, most=1)
    contrast: float = option("views", ViewRanges.contrast, "factor in [1 - x, 1 + x]", least=0, most=1)
    saturation: float = option("views", ViewRanges.saturation, "factor in [1 - x, 1 + x]", least=0, most=1)
    hue: float = option("views", ViewRanges.hue, "shift in [-x, x] of a turn", least=0, most=0.5)
    grayscale: float = option("views", ViewRanges.grayscale, "probability", least=0, most=1)
    blur: float = option("views", ViewRanges.blur, "probability of a Gaussian blur", least=0, most=1)
    solarize: float = option("views", ViewRanges.solarize, "probability of inverting the bright half", least=0, most=1)

    output: str | None = option("run", None, "run folder; none: runs/<data>-<date>-<time>", metavar="DIR")
    overwrite: bool = option("run", False, "write into an --output that is not empty")
    resume: str | None = option(
        "run", None, "a run folder to go on with; auto: --output, if it has a checkpoint", metavar="auto|RUN"
    )
    seed: int = option("optimisation", 0, "same seed, same machine, same threads: same result on a CPU", least=0)
    device: str = option("run", "auto", "auto, cpu, cuda or cuda:N")
    compile: str = option(
        "run", "auto", "torch.compile of model and views; auto: on a GPU", choices=("auto", "on", "off")
    )
    log_every: int = option("run", 10, "steps between log lines", least=1, metavar="STEPS")
    save_every: int = option("run", 10, "epochs between checkpoints", least=1, metavar="EPOCHS")
    knn_every: int | None = option(
        "run", None, "epochs between k-NN on held-out training images; 0: never; none: 10 where there are labels",
        least=0, metavar="EPOCHS",
    )  # fmt: skip
    limit_steps: int | None = option("run", None, "stop after this many steps (for smoke tests)", least=1)
    evaluate: bool = option("run", True, "score the encoder with a linear probe and k-NN at the end")

    def __post_init__(self) -> None:
        for name in ("data_root", "output", "resume"):
            if (path := getattr(self, name)) is not None:  # --output=~/runs reaches us as it is
                object.__setattr__(self, name, os.path.expanduser(path))
        # A run may go on, or be scored, from another working directory.
        object.__setattr__(self, "data_root", os.path.abspath(self.data_root))
        if self.data_family == "folder" and (path := self.data.partition(":")[2]):
            object.__setattr__(self, "data", f"folder:{os.path.abspath(os.path.expanduser(path))}")
        for f in fields(self):
            check_range(f.name, getattr(self, f.name), f.metadata)
        if self.crop_area[0] > self.crop_area[1]:
            raise UserError(f"--crop-area must be the smaller share, then the larger, got {list(self.crop_area)}")
        if self.objective == "simclr" and (self.learn_scale or self.learn_bias or self.bias):
            raise UserError("--bias, --learn-bias and --learn-scale are not for --objective simclr: it has no logits")
        if self.objective not in ("mio", "sigclr"):
            for name in ("negative_temperature", "negative_weight", "views"):
                if getattr(self, name) != getattr(Config, name):
                    raise UserError(f"{flag(name)} belongs to mio and sigclr, not to --objective {self.objective}")
        if self.views % 2:
            raise UserError(f"--views must be even, got {self.views}")
        if self.negative_temperature is not None and self.learn_scale:
            raise UserError("--learn-scale learns one temperature for all pairs: drop --negative-temperature")
        if self.scale_learning_rate is not None and not (self.learn_scale or self.learn_bias):
            raise UserError("--scale-learning-rate needs --learn-scale or --learn-bias")
        if self.backbone.startswith(TIMM) and (self.stem != "auto" or not self.stem_padding or self.width != WIDTH):
            raise UserError(f"--stem, --no-stem-padding and --width belong to ResNets: {self.backbone} has its own")
        if self.backbone not in RESNETS and not self.backbone.startswith(TIMM):
            raise UserError(f"--backbone must be one of {', '.join(RESNETS)} or timm:NAME, got {self.backbone!r}")
        if not self.projector:
            raise UserError("--projector must name at least the width of the embedding")
        if self.resume == "auto" and self.output is None:
            raise UserError("--resume auto needs --output, the run folder to look into")

    @property
    def data_family(self) -> str:
        return self.data.split(":", 1)[0]

    @property
    def embedding(self) -> int:
        return self.projector[-1]

    def run_to_resume(self) -> Path | None:
        """The folder of the run to go on with; None for a new run."""
        if self.resume is None:
            return None
        folder = Path(self.output or self.resume)
        return None if self.resume == "auto" and not (folder / CHECKPOINT).exists() else folder

    def to_toml(self) -> str:
        """All options, loadable by ``--config``; an option left to the script (none) is a comment."""
        lines = []
        for f in fields(self):
            value = getattr(self, f.name)
            lines.append(f"# {f.name}: none" if value is None else f"{f.name} = {toml_value(value)}")
        return "\n".join(lines) + "\n"


RUN_OPTIONS = frozenset(f.name for f in fields(Config) if f.metadata["group"] == "run")
TYPES = typing.get_type_hints(Config)


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return "[" + ", ".join(toml_value(v) for v in value) + "]"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")  # TOML escapes as JSON does
    return repr(value)


def check_range(name: str, value: Any, limits: Any) -> None:
    """NaN fails every comparison, so it is refused too."""
    if value is None:
        return
    if limits["choices"] and value not in limits["choices"]:
        raise UserError(f"{flag(name)} must be one of {', '.join(limits['choices'])}, got {value!r}")
    if isinstance(value, str) and not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"{flag(name)} {value!r} is no UTF-8: config.toml cannot hold it; rename it") from error
    for number in value if isinstance(value, tuple) else (value,):
        if isinstance(number, str | bool):
            continue
        if limits["above"] is not None and not limits["above"] < number < math.inf:
            raise UserError(f"{flag(name)} must be greater than {limits['above']}, got {number}")
        if limits["least"] is not None and not limits["least"] <= number:
            raise UserError(f"{flag(name)} must be at least {limits['least']}, got {number}")
        if not (abs(number) < math.inf and number <= limits["most"]):
            expected = "finite" if limits["most"] == math.inf else f"at most {limits['most']}"
            raise UserError(f"{flag(name)} must be {expected}, got {number}")


def element_type(name: str) -> tuple[type, int | None]:
    """(int, float, bool or str; how many of them: 1, a fixed number, or None for any number)."""
    hint = TYPES[name]
    if typing.get_origin(hint) is tuple:
        inner = typing.get_args(hint)
        return inner[0], None if inner[-1] is Ellipsis else len(inner)
    alone = [t for t in typing.get_args(hint) if t is not type(None)]
    return (alone[0] if alone else hint), 1


def convert(name: str, value: Any, source: Path) -> Any:
    """A TOML value as the option's type; an integer will do for a float, nothing else is converted."""
    kind, count = element_type(name)
    values = value if isinstance(value, list) and count != 1 else [value]
    good = all(type(v) is kind or (kind is float and type(v) is int) for v in values)
    if not good or (count is not None and len(values) != count):
        expected = kind.__name__ if count == 1 else f"a list of {count or 'one or more'} {kind.__name__}"
        raise UserError(f"{source}: {name} must be {expected}, got {value!r}")
    converted = tuple(kind(v) for v in values)
    return converted[0] if count == 1 else converted


def read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid TOML: {error}") from error


def read_options(path: Path, table: dict[str, Any]) -> dict[str, Any]:
    """The options of one TOML table; a name that is no option is an error."""
    if unknown := sorted(set(table) - set(TYPES)):
        raise UserError(f"{path}: unknown option {', '.join(unknown)} (--help lists them, with - for _)")
    return {name: convert(name, value, path) for name, value in table.items()}


def load_config(run: Path) -> Config:
    """The options that a run was started with."""
    path = run / "config.toml"
    if not path.is_file():
        raise UserError(f"{run} is no run folder: it has no config.toml")
    options = read_toml(path)
    options.pop("accumulate_steps", None)  # an option of older runs, always 1
    return Config(**read_options(path, options))


def check_same(saved: Config, config: Config, run: Path) -> None:
    """A resumed run must compute what it would have computed: only options of the group "run" may differ, the
    path of a folder, whose content is compared, and --epochs where --schedule-epochs says when the learning rate
    ends."""
    free = RUN_OPTIONS
    if saved.data_family == config.data_family == "folder":
        free |= {"data"}
    if saved.schedule_epochs is not None and config.epochs <= saved.schedule_epochs:
        free |= {"epochs"}  # the learning rate does not depend on it: the run may become longer
    names = [n for n in TYPES if n not in free and getattr(saved, n) != getattr(config, n)]
    if names:
        diff = "\n".join(f"  {flag(n)}: {getattr(saved, n)} in the run, {getattr(config, n)} now" for n in names)
        raise UserError(
            f"{run} was started with other options, so it cannot be resumed with these:\n{diff}\n"
            f"  free to change: {', '.join(flag(n) for n in sorted(free - {'output', 'resume', 'overwrite'}))}"
        )
