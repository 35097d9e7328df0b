# SPDX-License-Identifier: Apache-2.0

"""Options: precedence of defaults, data set, preset, file and command line; what is refused; the presets."""

import tomllib

import pytest

pytest.importorskip("torchvision")
from train import pretrain
from train.command_line import make_parser, parse_arguments, preset_names
from train.config import RUN_OPTIONS, Config, load_config
from train.errors import UserError


def parse(*argv: str) -> Config:
    return parse_arguments(list(argv), "pretrain.py", "")[0]


def test_later_layers_win(tmp_path):
    file = tmp_path / "my.toml"
    file.write_text('preset = "simclr"\ndata = "digits"\ntemperature = 0.2\nepochs = 7\n')
    assert (Config().epochs, Config().warmup_epochs, Config().objective) == (200, 5.0, "mio")
    assert (parse().epochs, parse().warmup_epochs) == (30, 2)  # the default data set, digits
    assert parse("--data", "cifar10").epochs == 200
    preset = parse("--preset", "simclr")
    assert (preset.objective, preset.temperature, preset.epochs) == ("simclr", 0.5, 30)
    from_file = parse("--config", str(file))
    assert (from_file.objective, from_file.temperature, from_file.epochs) == ("simclr", 0.2, 7)
    assert from_file.warmup_epochs == 2
    line = parse("--config", str(file), "--preset", "mio", "--epochs", "3")
    assert (line.objective, line.temperature, line.epochs) == ("mio", 0.2, 3)
    # A preset knows better than the data set.
    assert parse("--preset", "mio-v1").batch_size == 128


def test_the_default_preset_depends_on_the_data_and_gives_way_to_an_objective():
    def loss(*argv: str) -> tuple:
        config = parse(*argv)
        return config.objective, config.temperature, config.negative_weight, config.bias

    assert loss() == loss("--preset", "mio") == ("mio", 0.5, 1.0, 0.0)  # digits
    assert loss("--data", "cifar10") == ("mio", 0.2, 256.0, -5.5)
    assert loss("--data", "folder:photos", "--bias", "-6") == ("mio", 0.2, 256.0, -6.0)
    assert loss("--data", "cifar10", "--objective", "mio") == ("mio", 0.5, 1.0, 0.0)  # the paper's
    assert loss("--data", "cifar10", "--objective", "simclr") == ("simclr", 0.5, 1.0, 0.0)


def test_the_printed_options_are_a_file_of_options(tmp_path, capsys):
    argv = ["--preset", "siglip-ssl", "--projector", "64", "32", "--output", 'a "b"\\c', "--knn-every", "3"]
    assert pretrain.run([*argv, "--print-config"]) == 0
    printed = capsys.readouterr().out
    assert tomllib.loads(printed)["projector"] == [64, 32]
    file = tmp_path / "printed.toml"
    file.write_text(printed)
    assert parse("--config", str(file)) == parse(*argv)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epoch = 3", r"my.toml: unknown option epoch \(--help lists them, with - for _\)"),
        ('epochs = "ten"', "my.toml: epochs must be int, got 'ten'"),
        ("epochs = 1.5", "my.toml: epochs must be int, got 1.5"),
        ("download = 1", "my.toml: download must be bool, got 1"),
        ("crop_area = [0.5]", r"my.toml: crop_area must be a list of 2 float, got \[0.5\]"),
        ("projector = []", "--projector must name at least the width of the embedding"),
        ("temperature = -1", "--temperature must be greater than 0, got -1"),
        ("temperature = nan", "--temperature must be greater than 0, got nan"),
        ('backbone = "vit"', "--backbone must be one of resnet18, resnet34, resnet50 or timm:NAME, got 'vit'"),
        ("epochs = ", "my.toml is not valid TOML"),
        ('preset = "moco"', "--preset must be one of mio, mio-v1, sigclr, siglip-ssl, simclr, got 'moco'"),
    ],
)
def test_a_wrong_file_is_one_sentence(text, message, tmp_path):
    (tmp_path / "my.toml").write_text(text)
    with pytest.raises(UserError, match=message):
        parse("--config", str(tmp_path / "my.toml"))


def test_a_missing_file_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match=r"cannot read .*none.toml: No such file"):
        parse("--config", str(tmp_path / "none.toml"))


@pytest.mark.parametrize("preset", preset_names())
def test_every_preset_trains_a_step(preset, tmp_path, capsys):
    argv = ["--preset", preset, "--batch-size", "4", "--backbone", "resnet18", "--device", "cpu", "--image-size", "16"]
    assert pretrain.run([*argv, "--dry-run"]) == 0
    assert "dry run: " in capsys.readouterr().out
    assert pretrain.run([*argv, "--limit-steps", "2", "--no-evaluate", "--output", str(tmp_path / "run")]) == 0


def test_help_names_every_option():
    text = make_parser("pretrain.py", "", Config()).format_help()
    for name in Config.__dataclass_fields__:
        assert "--" + name.replace("_", "-") in text
    assert {"output", "device", "log_every"} <= RUN_OPTIONS
    assert not {"temperature", "epochs", "seed", "data"} & RUN_OPTIONS


@pytest.mark.parametrize("name", ['quo"te', "back\\slash", "new\nline", "tab\t", "\x7f", "日本", "\x1b[0m"])
def test_any_path_survives_config_toml(name, tmp_path):
    config = Config(data=f"folder:{name}", output=name)
    (tmp_path / "config.toml").write_text(config.to_toml(), encoding="utf-8")
    assert load_config(tmp_path) == config


def test_a_path_that_is_no_utf8_is_refused_before_anything_is_done():
    with pytest.raises(UserError, match=r"--data 'folder:.*caf\\udce9' is no UTF-8"):
        Config(data="folder:caf\udce9")


def test_a_tilde_is_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    config, _ = parse_arguments(["--output=~/x", "--data-root=~/data"], "pretrain.py", "")
    assert (config.output, config.data_root) == ("/home/me/x", "/home/me/data")
