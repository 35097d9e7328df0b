# SPDX-License-Identifier: Apache-2.0

"""Linear probe, k-NN and feature extraction where the right answer is known."""

import math
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("torchvision")
pytest.importorskip("sklearn")

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from train import probes
from train.model import build_model


def toy_features(noise: float, shuffle: bool = False) -> probes.Features:
    """Four classes around the unit vectors of a 4-dimensional space; labels of no meaning on request."""
    generator = torch.Generator().manual_seed(0)

    def split(n: int):
        labels = torch.arange(n) % 4
        x = torch.eye(4)[labels] + noise * torch.randn(n, 4, generator=generator)
        return x, labels[torch.randperm(n, generator=generator)] if shuffle else labels

    return probes.Features(*split(400), *split(2000))


def test_probes_are_right_where_the_answer_is_known():
    separated = toy_features(noise=0.05)
    assert probes.knn_accuracy(separated) == 1.0
    assert probes.linear_probe(separated).accuracy == 1.0
    mean, std = probes.few_label_accuracy(separated, 2)
    assert (mean, std) == (1.0, 0.0)
    meaningless = toy_features(noise=0.05, shuffle=True)  # chance is 1/4, standard error 0.01
    assert abs(probes.knn_accuracy(meaningless) - 0.25) < 0.05
    assert abs(probes.linear_probe(meaningless).accuracy - 0.25) < 0.05


def test_probes_ignore_the_scale_and_offset_of_the_features():
    features = toy_features(noise=0.5)
    moved = features._replace(train=1000 * features.train + 7, test=1000 * features.test + 7)
    assert 0.5 < probes.linear_probe(features).accuracy < 0.95
    assert probes.linear_probe(moved).accuracy == pytest.approx(probes.linear_probe(features).accuracy, abs=0.002)


def test_nearest_neighbours_vote_with_their_similarity():
    """Two close neighbours of class 1 outvote three far ones of class 0; at k = 1 only the closest counts."""
    close, far = torch.tensor([[1.0, 0.0], [1.0, 0.01]]), torch.tensor([[0.1, 1.0], [0.12, 1.0], [0.11, 1.0]])
    features = probes.Features(
        torch.cat([close, far]), torch.tensor([1, 1, 0, 0, 0]), torch.tensor([[5.0, 0.0]]), torch.tensor([1])
    )
    assert probes.knn_accuracy(features, k=5) == 1.0
    assert probes.knn_accuracy(features._replace(test_labels=torch.tensor([0])), k=5) == 0.0
    # At a high temperature every neighbour has the same vote, and the three win.
    assert probes.knn_accuracy(features, k=5, temperature=1e6) == 0.0


def test_the_probe_is_chosen_without_the_test_split():
    features = toy_features(noise=0.5)
    chosen = probes.linear_probe(features)
    other = probes.linear_probe(features._replace(test_labels=features.test_labels.roll(1)))
    assert other[1:] == chosen[1:]
    assert other.accuracy < 0.5 < chosen.accuracy


def test_probes_trained_together_are_probes_trained_alone(monkeypatch):
    monkeypatch.setattr(probes, "PROBE_STEPS", 50)
    features = toy_features(noise=0.5)
    grid = [(0.1, 0.0), (1.0, 1e-3)]
    together = probes.train_probes(features.train, features.train_labels, 4, grid)
    for i, setting in enumerate(grid):
        alone = probes.train_probes(features.train, features.train_labels, 4, [setting])
        for a, b in zip(together, alone, strict=True):
            torch.testing.assert_close(a[i], b[0], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(together[0][0], together[0][1], atol=0.1)


def test_rankme_of_known_spectra():
    orthogonal = torch.linalg.qr(torch.randn(50, 8, generator=torch.Generator().manual_seed(0)))[0]
    assert probes.rankme(orthogonal).item() == pytest.approx(8, rel=1e-5)
    assert probes.rankme(orthogonal[:, :1] @ torch.ones(1, 8)).item() == pytest.approx(1, abs=1e-3)
    spectrum = torch.tensor([0.5, 0.25, 0.25, 0, 0, 0, 0, 0])
    entropy = 0.5 * math.log(2) + 0.5 * math.log(4)
    assert probes.rankme(orthogonal * spectrum).item() == pytest.approx(math.exp(entropy), rel=1e-3)


def test_label_draws_are_balanced_fixed_and_different():
    labels = torch.arange(200) % 10
    draws = probes.label_draws(labels, 3, 5)
    for draw in draws:
        assert labels[torch.from_numpy(draw)].bincount().tolist() == [3] * 10
        assert len(set(draw.tolist())) == 30
    assert len({tuple(sorted(draw.tolist())) for draw in draws}) == 5
    assert [draw.tolist() for draw in draws] == [draw.tolist() for draw in probes.label_draws(labels, 3, 5)]


def test_features_use_running_statistics_and_restore_the_mode():
    torch.manual_seed(0)
    model = build_model("resnet18", 1, "3x3", (16, 8)).train()
    images = torch.randn(6, 1, 8, 8)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    together = probes.extract_features(model.backbone, images, torch.Tensor.float)
    alone = torch.cat([probes.extract_features(model.backbone, image[None], torch.Tensor.float) for image in images])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)
    assert model.backbone.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_pair_cosines_of_known_views():
    z1, z2 = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[3.0, 0.0], [0.0, -1.0]])
    cosines = probes.pair_cosines(z1, z2)
    assert sorted(cosines.positive.tolist()) == [-1.0, 1.0]
    assert cosines.negative.tolist() == [0.0] * 4
