# SPDX-License-Identifier: Apache-2.0
"""Every file of examples/ does what it says with the library's own package, and its loss falls."""

import importlib.util
import json
import re
import runpy

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, relative_error, run_python

FOLDER = ROOT / "examples"
PACKAGES = {
    "open_clip_siglip": ("open_clip",),
    "huggingface_siglip": ("transformers", "accelerate"),
    "lightly_simclr": ("lightly", "torchvision"),
    "lightning_module": ("lightning",),
    "metric_learning_labels": ("pytorch_metric_learning",),
    "sentence_transformers_siglip": ("sentence_transformers", "datasets"),
    "timm_vit": ("timm", "torchvision", "sklearn", "safetensors"),
}

#: Runs the files it is given one after the other in one process, for what takes long is importing torch; a JSON line
#: each, of what it printed or how it failed.
DRIVER = """
import contextlib, io, json, runpy, sys, traceback
for path in sys.argv[1:]:
    text = io.StringIO()
    try:
        with contextlib.redirect_stdout(text):
            runpy.run_path(path, run_name="__main__")
        line = {"printed": text.getvalue()}
    except BaseException:
        line = {"error": traceback.format_exc()}
    print("\\n" + json.dumps({"name": path.rsplit("/", 1)[-1].removesuffix(".py"), **line}), flush=True)
"""


def missing(name):
    return [package for package in PACKAGES[name] if importlib.util.find_spec(package) is None]


@pytest.fixture(scope="module")
def results():
    paths = [str(FOLDER / f"{name}.py") for name in PACKAGES if not missing(name)]
    env = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    run = run_python("-c", DRIVER, *paths, env=env)
    lines = [json.loads(line) for line in run.stdout.splitlines() if line.startswith('{"name"')]
    assert len(lines) == len(paths), run.stderr[-3000:]
    return {line["name"]: line for line in lines}


def test_the_list_is_the_folder_and_its_page():
    page = (FOLDER / "README.md").read_text()
    files = {path.stem: path.read_text() for path in FOLDER.glob("*.py")}
    assert files.keys() == PACKAGES.keys()
    for name, text in files.items():
        assert f"[{name}.py]({name}.py)" in page and f"examples/{name}.py" in page
        assert len(text.splitlines()) <= 60, name
    for target in re.findall(r"\]\(([^)#]+)\)", page):
        assert target.startswith("https://") or (FOLDER / target).exists(), target


@pytest.mark.parametrize("name", PACKAGES)
def test_it_runs_and_its_loss_falls(name, request):
    if lacking := missing(name):
        pytest.skip(f"needs {', '.join(lacking)}: pip install --group examples")
    result = request.getfixturevalue("results")[name]
    assert "error" not in result, result["error"]
    losses = [float(value) for value in re.findall(r"^(?:epoch \d+: )?loss ([\d.]+)", result["printed"], re.MULTILINE)]
    if name == "open_clip_siglip":
        losses = [float(v) for v in re.search(r"([\d.]+) before, ([\d.]+) after", result["printed"]).groups()]
    assert len(losses) >= 2 and losses[-1] < 0.95 * losses[0], result["printed"]


@pytest.mark.parametrize("name", ["open_clip_siglip", "huggingface_siglip"])
def test_it_prints_the_librarys_own_value_and_ours(name, request):
    if lacking := missing(name):
        pytest.skip(f"needs {', '.join(lacking)}")
    printed = request.getfixturevalue("results")[name]["printed"]
    theirs, ours = map(float, re.search(r"^\S+ ([\d.]+), mio_ext ([\d.]+)", printed, re.MULTILINE).groups())
    assert theirs > 1 and ours == pytest.approx(theirs, rel=1e-6)


def names_of(name):
    return runpy.run_path(str(FOLDER / f"{name}.py"), run_name="imported")


def dense(cosines, positive, scale, bias):
    logits = scale * cosines + bias
    return -F.logsigmoid(torch.where(positive, logits, -logits)).sum() / len(cosines)


def test_metric_learning_is_the_sum_over_labelled_pairs():
    pytest.importorskip("pytorch_metric_learning")
    loss = names_of("metric_learning_labels")["SigmoidPairLoss"]()
    z, memory = torch.randn(6, 5, requires_grad=True), torch.randn(4, 5)
    labels, remembered = torch.tensor([0, 1, 2, 0, 1, 1]), torch.tensor([2, 1, 0, 1])
    for other, other_labels, arguments in [(z, labels, {}), (memory, remembered, {"ref_emb": memory})]:
        if arguments:
            arguments["ref_labels"] = remembered
        cosines = F.normalize(z) @ F.normalize(other).T
        expected = dense(cosines, labels[:, None] == other_labels, loss.log_scale.exp(), loss.bias)
        got = loss(z, labels, **arguments)
        assert relative_error(got, expected) < 1e-6
        inputs = [z, loss.log_scale, loss.bias]
        for ours, theirs in zip(*(torch.autograd.grad(value, inputs) for value in (got, expected)), strict=True):
            assert relative_error(ours, theirs) < 1e-5
    with pytest.raises(ValueError, match="indices_tuple is not supported"):
        loss(z, labels, (torch.tensor([0]),) * 3)


def test_sentence_transformers_takes_hard_negatives_as_negatives():
    pytest.importorskip("sentence_transformers")
    columns = [torch.randn(4, 5) for _ in range(3)]
    loss = names_of("sentence_transformers_siglip")["SiglipLoss"](lambda features: features)
    cosines = F.normalize(columns[0]) @ F.normalize(torch.cat(columns[1:])).T
    expected = dense(cosines, torch.eye(4, 8, dtype=torch.bool), 10, -10)
    assert relative_error(loss([{"sentence_embedding": column} for column in columns]), expected) < 1e-6
    assert {name for name, _ in loss.named_parameters()} == {"log_scale", "bias"}
