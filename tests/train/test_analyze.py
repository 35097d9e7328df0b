# SPDX-License-Identifier: Apache-2.0
"""analyze.py on a short run, and docs/theory.md against the committed data."""

import dataclasses
import json
import math
import re

import pytest
import torch
from conftest import ROOT, relative_error

pytest.importorskip("torchvision")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
from mio_ext import analysis, reference
from train import analysis_plots, analyze, pretrain
from train.assemble import load_run
from train.config import load_config
from train.displacement import Displacement
from train.features import PairCosines
from train.run_folder import ANALYSIS_PLOTS

pytestmark = pytest.mark.usefixtures("one_thread")

THEORY = (ROOT / "docs" / "theory.md").read_text()
DATA = ROOT / "benchmarks" / "results" / "amd-epyc-2-threads" / "digits-analysis.json"
SMALL = ["--batch-size", "16", "--device", "cpu", "--limit-steps", "4", "--log-every", "2", "--no-evaluate"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "digits"
    assert pretrain.run([*SMALL, "--forward", "separate", "--output", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def analysed(run):
    """(run folder, the numbers); forward "separate", so both kinds of batch statistics are covered by the tests."""
    assert analyze.run([str(run), "--device", "cpu"]) == 0
    return run, json.loads((run / "analysis.json").read_text())


def test_the_log_holds_the_norms_of_the_gradient(run):
    """The parts of the last step's gradient add up, as far as norms can tell."""
    entries = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    train = [entry for entry in entries if entry["event"] == "train"]
    assert [entry["step"] for entry in train] == [2, 4]
    for entry in train:
        attraction, repulsion, regularizer, gradient = (entry[name] for name in analyze.NORMS)
        assert 0 < regularizer < attraction
        assert attraction - repulsion - regularizer < gradient < attraction + repulsion + regularizer


def test_the_page_shows_every_figure_with_a_caption(analysed):
    run, values = analysed
    page = (run / "analysis.md").read_text()
    assert re.findall(r"!\[\]\((.*?)\)\n\n\*[A-Z].{100,}\*\n", page) == list(ANALYSIS_PLOTS)
    for name in ANALYSIS_PLOTS:
        assert (run / name).read_bytes().startswith(b"\x89PNG")
    assert analysis_plots.table(values) in page
    assert values["history"]["step"] == [0, 2, 4]


def test_the_prediction_is_the_measurement_for_short_steps(analysed):
    for name, several in analysed[1]["displacement"].items():
        errors = [move["relative_error"] for move in several]
        assert [move["rate"] for move in several] == pytest.approx([0.5 / 10**k for k in range(7)])
        assert several[-1]["r2"] > 0.9999, name
        if name == analyze.LAST_LAYER:  # no ReLU behind it: the error relative to Δz is of first order
            assert errors[2] / errors[3] == pytest.approx(10, rel=0.05)


def test_step_0_is_the_run_s_own_start(analysed):
    """The untrained network is rebuilt from the seed: its first loss, as the run saw it, is near that of the log."""
    run, values = analysed
    config, setup = load_config(run), load_run(run, "cpu", None, None)
    fresh = pretrain.assemble(dataclasses.replace(config, device="cpu")).model.state_dict()
    rebuilt = analyze.untrained_like(config, setup).state_dict()
    assert all(torch.equal(rebuilt[name], value) for name, value in fresh.items())
    trained = setup.model.state_dict()
    assert not torch.equal(trained["projector.0.weight"], rebuilt["projector.0.weight"])
    assert values["history"]["js_estimate"][0] < 0.2


def test_measuring_leaves_the_model_alone(run):
    config, setup = load_config(run), load_run(run, "cpu", None, None)
    before = {name: value.clone() for name, value in setup.model.state_dict().items()}
    batch = analyze.Batch(config, setup, analyze.load_loss(config, setup, run), 16)
    (move,) = analyze.last_layer_displacements(batch, setup.model, [0.1])
    z = batch.embed(setup.model)
    assert move.measured.shape == z.shape == (32, 128) and z.dtype == torch.float64
    assert all(torch.equal(value, before[name]) for name, value in setup.model.state_dict().items())
    # What the last layer alone predicts is not what moves when everything does.
    (network,) = analyze.network_displacements(batch, setup.model, [1e-7])
    assert relative_error(move.predicted / 0.1, network.predicted / 1e-7) > 0.1


def test_r2_and_relative_error():
    predicted, measured = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 4.0]])
    move = Displacement(0.1, predicted, measured)
    assert move.r2 == pytest.approx(1 - 4 / 4.5)
    assert move.relative_error == pytest.approx(2 / math.sqrt(17))
    assert [analysis_plots.r_squared(v) for v in (1.0, 0.99999, 0.5, -3.21)] == ["1.0000", "0.9999", "0.5000", "-3.2"]


def test_the_best_affine_critic_is_the_best():
    """Gaussian cosines of one variance: log p/q is affine and known, and no other critic finds more."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2, 200_000, generator=generator, dtype=torch.float64)
    cosines = PairCosines(0.4 + 0.2 * noise[0], 0.2 * noise[1])
    scale, bias = analyze.best_affine_critic(cosines)
    assert (scale, bias) == (pytest.approx(0.4 / 0.04, rel=0.02), pytest.approx(-0.08 / 0.04, rel=0.02))
    best = analyze.information(cosines, scale, bias)
    assert best > max(analyze.information(cosines, scale * f, bias + d) for f, d in [(0.9, 0), (1.1, 0), (1, 0.2)])
    plain = math.log(2) - float(
        (reference.softplus(-cosines.positive / 0.5).mean() + reference.softplus(cosines.negative / 0.5).mean()) / 2
    )
    assert analyze.information(cosines, 2.0, 0.0) == pytest.approx(plain, abs=1e-12)
    assert plain < best


def test_the_share_of_positives_counts_both_kinds_alike():
    positive, negative = torch.tensor([0.51] * 30), torch.tensor([0.51] * 100 + [-0.51] * 300)
    centres, share = analysis_plots.positive_share(PairCosines(positive, negative))
    assert centres.tolist() == pytest.approx([-0.525, 0.525])
    assert share.tolist() == pytest.approx([0, 1 / (1 + 0.25)])


@pytest.mark.parametrize(
    ("objective", "options", "message"),
    [
        ("simclr", [], "minimised simclr: the closed forms of docs/theory.md are those of mio"),
        (None, [], "is no run folder"),
        (None, ["--images", "1"], "--images must be at least 2, got 1"),
    ],
)
def test_a_mistake_is_one_line(objective, options, message, tmp_path, capsys):
    folder = tmp_path / "run"
    if objective is not None:
        assert pretrain.run([*SMALL, "--objective", objective, "--limit-steps", "1", "--output", str(folder)]) == 0
        assert "attraction_norm" not in (folder / "log.jsonl").read_text()
    assert analyze.run([str(folder), "--device", "cpu", *options]) == 2
    error = capsys.readouterr().err
    assert re.match(f"analyze.py: .*{message}", error) and error.count("\n") == 1


def test_a_log_without_norms_is_said(run, tmp_path, capsys):
    lines = [re.sub(r', "attraction_norm": [^,}]*', "", line) for line in (run / "log.jsonl").open()]
    (tmp_path / "log.jsonl").write_text("".join(lines))
    with pytest.raises(analyze.UserError, match="holds no norms of attraction and repulsion"):
        analyze.history(tmp_path, {"step": 0})


def test_overwriting_a_run_removes_its_page(tmp_path):
    for name in ("analysis.md", "analysis.json", *ANALYSIS_PLOTS):
        (tmp_path / name).write_text("stale")
    pretrain.create_run_folder(str(tmp_path), "digits", overwrite=True)
    assert not list(tmp_path.iterdir())


class TestTheory:
    def test_measured_numbers_are_the_data(self):
        assert analysis_plots.table(json.loads(DATA.read_text())) in THEORY

    def test_ceilings(self):
        rows = re.search(r"<!-- ceilings.*?-->\n.*\n.*\n((?:\|.*\n)+)<!-- end -->", THEORY)[1].splitlines()
        assert len(rows) == 4
        for row in rows:
            tau, plain, bias, best = (float(cell.replace("−", "-")) for cell in row.strip("| ").split("|"))
            assert plain == pytest.approx(analysis.js_ceiling(tau), abs=5e-4)
            assert bias == pytest.approx(-1 / (2 * tau), abs=0.05)
            assert best == pytest.approx(analysis.js_ceiling(tau, -1 / (2 * tau)), abs=5e-4)

    def test_two_temperatures_bound_nothing(self):
        """Section 1, condition 1: collapsed rows hold no information, and yet the estimate is above 0."""
        z = torch.ones(4, 3, dtype=torch.float64)
        _, stats = analyze.mio_ext.mio_loss(z, z, temperature=0.01, negative_temperature=1e6, return_stats=True)
        assert float(analysis.js_estimate(stats)) == pytest.approx(math.log(2) / 2, abs=1e-5)
        _, stats = analyze.mio_ext.mio_loss(z, z, temperature=0.01, return_stats=True)
        assert float(analysis.js_estimate(stats)) < 0

    def test_regulariser_against_attraction(self):
        """Eq. (26) and the numbers beside it."""
        z1, z2 = torch.randn(2, 8, 128, generator=torch.Generator().manual_seed(0)).double()
        parts = analysis.gradient_parts(z1, z2)
        s = torch.cosine_similarity(z1, z2).repeat(2)
        ratio = parts.regularizer.norm(dim=1) / parts.attraction.norm(dim=1)
        assert relative_error(ratio, 2 * 0.5 / (128 * torch.sigmoid(-s / 0.5))) < 1e-10
        sigma = 1 / (1 + math.exp(2))
        assert 1 / (128 * sigma) == pytest.approx(0.066, abs=5e-4)
        assert 2 * 0.1 / (128 * (1 / (1 + math.exp(10)))) == pytest.approx(34, abs=0.5)

    def test_equations_are_numbered_on_from_the_reference(self):
        assert [int(n) for n in re.findall(r"\\tag\{(\d+)\}", THEORY)] == list(range(15, 38))

    def test_links_and_figures_exist(self):
        for target in re.findall(r"\]\(([^)#]+)\)", THEORY):
            path = ROOT / "docs" / target
            assert path.exists(), target
            assert path.suffix != ".png" or path.stat().st_size < 200_000
