# SPDX-License-Identifier: Apache-2.0

"""Linear probe, k-NN and feature extraction where the right answer is known."""

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
    assert probes.linear_accuracy(separated) == 1.0
    mean, std = probes.few_label_accuracy(separated, 2)
    assert (mean, std) == (1.0, 0.0)
    meaningless = toy_features(noise=0.05, shuffle=True)  # chance is 1/4, standard error 0.01
    assert abs(probes.knn_accuracy(meaningless) - 0.25) < 0.05
    assert abs(probes.linear_accuracy(meaningless) - 0.25) < 0.05


def test_probes_ignore_the_scale_and_offset_of_the_features():
    features = toy_features(noise=0.5)
    moved = features._replace(train=1000 * features.train + 7, test=1000 * features.test + 7)
    assert 0.5 < probes.linear_accuracy(features) < 0.95
    assert probes.linear_accuracy(moved) == pytest.approx(probes.linear_accuracy(features), abs=0.002)


def test_nearest_neighbours_vote_with_their_similarity():
    """Two close neighbours of class 1 outvote three far ones of class 0, and the other way round at k = 5."""
    close, far = torch.tensor([[1.0, 0.0], [1.0, 0.01]]), torch.tensor([[0.1, 1.0], [0.12, 1.0], [0.11, 1.0]])
    features = probes.Features(
        torch.cat([close, far]), torch.tensor([1, 1, 0, 0, 0]), torch.tensor([[5.0, 0.0]]), torch.tensor([1])
    )
    assert probes.knn_accuracy(features, k=5) == 1.0
    assert probes.knn_accuracy(features._replace(test_labels=torch.tensor([0])), k=5) == 0.0


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
    model = build_model(1, 16, 8).train()
    images = torch.randn(6, 1, 8, 8)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    together = probes.extract_features(model.backbone, images)
    alone = torch.cat([probes.extract_features(model.backbone, image[None]) for image in images])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)
    assert model.backbone.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_pair_cosines_of_known_views():
    z1, z2 = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[3.0, 0.0], [0.0, -1.0]])
    cosines = probes.pair_cosines(z1, z2)
    assert sorted(cosines.positive.tolist()) == [-1.0, 1.0]
    assert cosines.negative.tolist() == [0.0] * 4
