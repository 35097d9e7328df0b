# SPDX-License-Identifier: Apache-2.0
"""From a command line to a :class:`~train.config.Config`: parser, presets, option files, and which of them wins."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

from train.config import TYPES, Config, check_same, element_type, flag, load_config, read_options, read_toml
from train.errors import UserError

PRESETS = Path(__file__).resolve().parent / "presets"
DATASETS = PRESETS / "datasets.toml"
DEFAULT_PRESET = "mio"


def preset_names() -> list[str]:
    return sorted(path.stem for path in PRESETS.glob("*.toml") if path != DATASETS)


class OneLineParser(argparse.ArgumentParser):
    """Reports a wrong argument in one line instead of the whole usage."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (--help lists the options)")


def make_parser(prog: str, description: str, defaults: Config) -> argparse.ArgumentParser:
    """``defaults`` are what ``--help`` shows."""
    parser = OneLineParser(prog=prog, description=description, add_help=False)
    parser.add_argument("-h", "--help", action="store_true", help="show this, with the defaults that apply, and stop")
    parser.add_argument(
        "--preset",
        help=f"a set of options: {', '.join(preset_names())} ({DEFAULT_PRESET}, or none where --objective is named)",
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="TOML file of options (and preset)")
    parser.add_argument("--print-config", action="store_true", help="print all options as TOML, and stop")
    parser.add_argument("--dry-run", action="store_true", help="set everything up, run one step, write nothing")
    groups = {g: parser.add_argument_group(g) for g in ("data", "optimisation", "loss", "model", "views", "run")}
    for f in fields(Config):
        kind, count = element_type(f.name)
        settings: dict[str, Any] = {"default": argparse.SUPPRESS, "dest": f.name}
        if kind is bool:
            settings["action"] = argparse.BooleanOptionalAction
        else:
            settings |= {"type": kind, "metavar": f.metadata["metavar"]}
            if count != 1:
                settings["nargs"] = count or "+"
            if f.metadata["choices"]:
                settings |= {"choices": f.metadata["choices"], "metavar": None}
        groups[f.metadata["group"]].add_argument(
            flag(f.name), help=f"{f.metadata['help']} ({shown(getattr(defaults, f.name))})", **settings
        )
    return parser


def shown(value: Any) -> str:
    """A value as one would type it."""
    if isinstance(value, tuple):
        return " ".join(map(shown, value))
    text = "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
    return text.replace("%", "%%")  # argparse formats the text


def combine(given: dict[str, Any], preset: str | None, file: Path | None, base: Config | None = None) -> Config:
    """The options of a run from what the command line gave; ``base`` replaces defaults and preset (resume).

    Who names an objective and no preset gets that objective with the options' own defaults.
    """
    if base is not None:
        return dataclasses.replace(base, **given)
    from_file = read_toml(file) if file is not None else {}
    preset = preset or from_file.pop("preset", None)
    from_file.pop("preset", None)
    own = (read_options(file, from_file) if file is not None else {}) | given
    family = Config(data=own.get("data", Config.data)).data_family
    layers = read_options(DATASETS, read_toml(DATASETS).get(family, {}))
    if preset is None and "objective" not in own:
        preset = DEFAULT_PRESET
    return Config(**(layers | (read_preset(preset, family) if preset is not None else {}) | own))


def read_preset(name: str, family: str) -> dict[str, Any]:
    """Its options, and those of its table for this kind of data if it has one."""
    if name not in preset_names():
        raise UserError(f"--preset must be one of {', '.join(preset_names())}, got {name!r}")
    path = PRESETS / f"{name}.toml"
    options = read_toml(path)
    tables = {key: options.pop(key) for key, value in list(options.items()) if isinstance(value, dict)}
    return read_options(path, options | tables.get(family, {}))


def parse_arguments(argv: Sequence[str] | None, prog: str, description: str) -> tuple[Config, argparse.Namespace]:
    """(the run's options, the parsed command line with preset, config, print_config and dry_run).

    ``--help`` ends the program; it shows what the rest of the command line leaves as it is.
    """
    args = make_parser(prog, description, Config()).parse_args(argv)
    given: dict[str, Any] = {
        name: tuple(v) if isinstance(v, list) else v for name, v in vars(args).items() if name in TYPES
    }
    if args.help:
        base = load_config(Path(given["resume"])) if given.get("resume") not in (None, "auto") else None
        make_parser(prog, description, combine(given, args.preset, args.config, base)).print_help()
        sys.exit(0)
    if given.get("resume") in (None, "auto"):
        config = combine(given, args.preset, args.config)
        if (folder := config.run_to_resume()) is not None:
            check_same(load_config(folder), config, folder)
        return config, args
    if args.preset or args.config:
        raise UserError("--resume RUN takes its options from the run: drop --preset and --config")
    run = Path(given["resume"])
    if given.get("output") not in (None, given["resume"]):
        raise UserError(f"--resume {run} goes on in that folder: drop --output")
    saved = load_config(run)
    config = combine(given | {"output": str(run)}, None, None, saved)
    check_same(saved, config, run)
    return config, args
