# SPDX-License-Identifier: Apache-2.0

"""Linear probes, k-NN, effective rank and feature extraction where the right answer is known."""

import re

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("torchvision")
pytest.importorskip("sklearn")

from train import features as frozen
from train import probes
from train.data import load_digits
from train.model import build_model

pytestmark = pytest.mark.usefixtures("one_thread")


def toy_features(noise: float, shuffle: bool = False) -> frozen.Features:
    """Four classes around the unit vectors of a 4-dimensional space; labels of no meaning on request."""
    generator = torch.Generator().manual_seed(0)

    def split(n: int):
        labels = torch.arange(n) % 4
        x = torch.eye(4)[labels] + noise * torch.randn(n, 4, generator=generator)
        return x, labels[torch.randperm(n, generator=generator)] if shuffle else labels

    return frozen.Features(*split(400), *split(2000))


def digit_pixels() -> frozen.Features:
    data = load_digits()
    train, test = (split.images.flatten(1).float() / 255 for split in (data.train, data.test))
    return frozen.Features(train, data.train.labels, test, data.test.labels)


def test_probes_are_right_where_the_answer_is_known():
    separated = toy_features(noise=0.05)
    assert probes.knn_accuracy(separated) == 1.0
    assert probes.linear_probe(separated, epochs=40).accuracy == 1.0
    assert probes.few_label_accuracy(separated, 2, 5) == (1.0, 0.0)
    meaningless = toy_features(noise=0.05, shuffle=True)  # chance is 1/4, standard error 0.01
    assert abs(probes.knn_accuracy(meaningless) - 0.25) < 0.05
    assert abs(probes.linear_probe(meaningless, epochs=40).accuracy - 0.25) < 0.05


def test_probes_ignore_the_scale_and_offset_of_the_features():
    features = toy_features(noise=0.5)
    moved = features._replace(train=1000 * features.train + 7, test=1000 * features.test + 7)
    rates = (0.3, 1.0, 3.0, 10.0)  # beyond these SGD is unstable and rounding decides, which offsets change
    result = probes.linear_probe(features, epochs=40, learning_rates=rates)
    assert 0.5 < result.accuracy < 0.95
    moved_result = probes.linear_probe(moved, epochs=40, learning_rates=rates)
    assert moved_result.accuracy == pytest.approx(result.accuracy, abs=0.002)
    expected = probes.few_label_accuracy(features, 10, 3)
    assert probes.few_label_accuracy(moved, 10, 3) == pytest.approx(expected, abs=0.002)


def test_probes_are_as_good_as_scikit_learns_logistic_regression():
    """On raw pixels; the few-label fits are the same optimum, the full one is within two of 360 images."""
    from sklearn.linear_model import LogisticRegression
    from threadpoolctl import threadpool_limits  # comes with scikit-learn

    features = digit_pixels()
    train, test = (split.numpy() for split in probes.scaled(features))
    y, y_test = features.train_labels.numpy(), features.test_labels.numpy()

    def sklearn_accuracy(fit, c: float, x, labels) -> float:
        with threadpool_limits(1):
            return LogisticRegression(C=c, max_iter=1000).fit(train[fit], y[fit]).score(x, labels)

    few = [
        sklearn_accuracy(index.numpy(), 1.0, test, y_test) for index in probes.label_draws(features.train_labels, 10, 3)
    ]
    assert probes.few_label_accuracy(features, 10, 3)[0] == pytest.approx(sum(few) / 3, abs=0.002)
    fit, hold_out = (index.numpy() for index in probes.stratified_split(features.train_labels, 0.9, 0))
    c = max((0.01, 0.1, 1.0), key=lambda c: sklearn_accuracy(fit, c, train[hold_out], y[hold_out]))
    everything = slice(None)
    assert probes.linear_probe(features).accuracy > sklearn_accuracy(everything, c, test, y_test) - 0.01


def test_a_bank_of_probes_equals_each_probe_alone():
    features = toy_features(noise=0.5)
    rows, settings = torch.arange(0, 400, 2), [(1.0, 0.0), (3.0, 1e-3), (10.0, 1e-2)]
    arguments = (features.train, features.train_labels, rows, 4)
    weight, bias = probes.train_probes(*arguments, settings, epochs=3, batch=16, seed=1)
    assert weight.shape == (3, 4, 4)
    for i, setting in enumerate(settings):
        alone_weight, alone_bias = probes.train_probes(*arguments, [setting], epochs=3, batch=16, seed=1)
        torch.testing.assert_close(weight[i], alone_weight[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(bias[i], alone_bias[0], rtol=1e-4, atol=1e-5)


def test_a_bank_of_probes_is_torchs_sgd():
    """The hand-written gradient, momentum and decay against autograd and torch.optim."""
    features, rows = toy_features(noise=0.5), torch.arange(400)
    weight, bias = probes.train_probes(features.train, features.train_labels, rows, 4, [(2.0, 0.01)], 2, 100, seed=0)
    layer = torch.nn.Linear(4, 4)
    torch.nn.init.zeros_(layer.weight), torch.nn.init.zeros_(layer.bias)
    groups = [{"params": [layer.weight], "weight_decay": 0.01}, {"params": [layer.bias]}]
    optimizer = torch.optim.SGD(groups, lr=2.0, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 8)
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):
        for index in torch.randperm(400, generator=generator).split(100):
            optimizer.zero_grad()
            F.cross_entropy(layer(features.train[index]), features.train_labels[index]).backward()
            optimizer.step(), schedule.step()
    torch.testing.assert_close(weight[0].T, layer.weight.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(bias[0], layer.bias.detach(), rtol=1e-4, atol=1e-5)


def test_the_test_split_cannot_influence_the_choice():
    features = toy_features(noise=0.5)
    other = features._replace(test_labels=(features.test_labels + 1) % 4)
    first, second = probes.linear_probe(features, epochs=20), probes.linear_probe(other, epochs=20)
    assert first[1:] == second[1:]
    assert first.accuracy > 0.5 > second.accuracy
    assert probes.linear_probe(features, epochs=20) == first


def test_a_choice_at_the_edge_of_the_grid_is_reported():
    """A rate of 0 learns nothing and an infinite one gives NaN: the choice is between them, so not at the edge."""
    features = toy_features(noise=0.5)
    rates = (0.0, 1.0, float("inf"))
    inside = probes.linear_probe(features, epochs=20, learning_rates=rates, weight_decays=(0.0, 10.0))
    assert inside[1:3] == (1.0, 0.0) and not inside.at_edge
    assert probes.linear_probe(features, epochs=20, learning_rates=rates[:2], weight_decays=(0.0, 10.0)).at_edge
    assert probes.linear_probe(features, epochs=20, learning_rates=rates, weight_decays=(1e-9,)).at_edge
    with pytest.raises(ValueError, match="no class has two samples"):
        probes.linear_probe(features._replace(train=features.train[:4], train_labels=torch.arange(4)))


class FourClasses(frozen.Features):
    """Features whose labels need not be read."""

    classes = 4


def test_steps_wait_for_no_gpu_and_mix_no_devices():
    """On tensors that only claim to be on a GPU: reading a value on the host, or meeting a CPU tensor, is an error."""
    with FakeTensorMode():
        x, y = torch.empty(400, 8, device="cuda"), torch.zeros(400, dtype=torch.long, device="cuda")
        rows = torch.arange(300, device="cuda")
        weight, bias = probes.train_probes(x, y, rows, 4, [(1.0, 0.0), (3.0, 1e-3)], epochs=2, batch=64, seed=0)
        assert (weight.device.type, weight.shape, bias.shape) == ("cuda", (2, 8, 4), (2, 4))
        with pytest.raises(DataDependentOutputException):
            float(weight.sum())
        with pytest.raises(DataDependentOutputException):  # the count of correct ones, after all chunks
            probes.knn_accuracy(FourClasses(x, y, x, y))
        train, test = probes.scaled(FourClasses(x, y, x, y))
        assert (train.device.type, test.device.type) == ("cuda", "cuda")


def test_the_only_values_read_are_the_results(monkeypatch):
    """More steps, chunks and draws read no more of them."""

    class Reads(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.count += func is torch.ops.aten._local_scalar_dense.default
            return func(*args, **(kwargs or {}))

    def reads(score) -> int:
        with Reads() as mode:
            score()
        return mode.count

    features = toy_features(noise=0.5)
    few = reads(lambda: probes.linear_probe(features, epochs=1))
    assert few == reads(lambda: probes.linear_probe(features, epochs=5)) < 60  # the split of each class, the results
    whole = reads(lambda: probes.knn_accuracy(features))
    monkeypatch.setattr(probes, "KNN_SIMILARITIES", 400 * 7)
    assert reads(lambda: probes.knn_accuracy(features)) == whole


def test_features_stay_on_the_device_that_has_room(monkeypatch):
    place = torch.device("meta")
    monkeypatch.setattr(frozen, "fits", lambda size, device: size <= 8000)
    assert frozen.roomy_device(1000, place) == place
    assert frozen.roomy_device(1001, place) == torch.device("cpu")


def test_nearest_neighbours_vote_with_the_exponential_of_their_similarity():
    """Two close neighbours of class 1 outvote three far ones of class 0 unless the temperature is high."""
    close, far = torch.tensor([[1.0, 0.0], [1.0, 0.01]]), torch.tensor([[0.1, 1.0], [0.12, 1.0], [0.11, 1.0]])
    features = frozen.Features(
        torch.cat([close, far]), torch.tensor([1, 1, 0, 0, 0]), torch.tensor([[5.0, 0.0]]), torch.tensor([1])
    )
    assert probes.knn_accuracy(features) == 1.0  # k is clipped to the five there are
    assert probes.knn_accuracy(features._replace(test_labels=torch.tensor([0]))) == 0.0
    assert probes.knn_accuracy(features, k=5, temperature=100.0) == 0.0  # 3 e^0.001 against 2 e^0.01


def test_nearest_neighbours_in_chunks_equal_all_at_once(monkeypatch):
    features = toy_features(noise=0.5)
    similarity = F.normalize(features.test, dim=1) @ F.normalize(features.train, dim=1).T
    weight, index = similarity.topk(20, dim=1)
    one_hot = F.one_hot(features.train_labels[index], 4) * (weight / 0.07).exp()[:, :, None]
    dense = float((one_hot.sum(1).argmax(1) == features.test_labels).double().mean())
    assert 0.5 < dense < 0.95
    assert probes.knn_accuracy(features) == pytest.approx(dense, abs=0.001)
    chunked = features._replace(test=features.test[:100], test_labels=features.test_labels[:100])
    parts = [
        probes.knn_accuracy(chunked._replace(test=row[None], test_labels=label[None]))
        for row, label in zip(chunked.test, chunked.test_labels, strict=True)
    ]
    assert probes.knn_accuracy(chunked) == pytest.approx(sum(parts) / 100)


def test_label_draws_are_balanced_fixed_and_different():
    labels = torch.arange(200) % 10
    draws = probes.label_draws(labels, 3, 5)
    for draw in draws:
        assert labels[draw].bincount().tolist() == [3] * 10
        assert draw.unique().numel() == 30
    assert len({tuple(sorted(draw.tolist())) for draw in draws}) == 5
    assert [draw.tolist() for draw in draws] == [draw.tolist() for draw in probes.label_draws(labels, 3, 5)]
    with pytest.raises(ValueError, match="21 labels a class asked for, but a class has only 20 samples"):
        probes.label_draws(labels, 21, 1)


def test_a_stratified_split_takes_the_same_share_of_every_class():
    labels = torch.tensor([0] * 100 + [1] * 50 + [3] * 10 + [4])
    chosen, rest = probes.stratified_split(labels, 0.1, seed=0)
    assert labels[chosen].bincount().tolist() == [10, 5, 0, 1, 1]  # at least one
    assert sorted([*chosen.tolist(), *rest.tolist()]) == list(range(161))
    assert len(probes.stratified_split(torch.zeros(100, dtype=torch.long), 0.29, seed=0)[0]) == 29
    assert not torch.equal(chosen, probes.stratified_split(labels, 0.1, seed=1)[0])


def test_label_budgets():
    assert probes.label_budgets(1437, 10) == (2, 10)
    assert probes.label_budgets(50_000, 10) == (50, 500)
    assert probes.label_budgets(50_000, 100) == (5, 50)
    assert probes.label_budgets(5_000, 10) == (5, 50)
    assert probes.label_budgets(6_000, 200) == (1, 3)


def test_rankme_of_known_spectra():
    generator = torch.Generator().manual_seed(0)
    orthogonal = torch.linalg.qr(torch.randn(40, 8, generator=generator))[0]
    assert frozen.rankme(3 * orthogonal).item() == pytest.approx(8, rel=1e-5)
    assert frozen.rankme(orthogonal.T).item() == pytest.approx(8, rel=1e-5)  # wider than tall
    assert frozen.rankme(torch.outer(torch.arange(1.0, 9.0), torch.ones(5))).item() == pytest.approx(1, abs=1e-4)
    z = orthogonal * torch.tensor([4.0, 2.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0])
    share = torch.tensor([0.5, 0.25, 0.125, 0.125])
    assert frozen.rankme(z).item() == pytest.approx(torch.special.entr(share).sum().exp().item(), rel=1e-4)
    assert frozen.rankme(torch.zeros(4, 3)).item() == 1.0
    assert frozen.rankme(torch.tensor([[1.0, float("nan")], [0.0, 1.0]])).isnan()


def test_features_use_running_statistics_and_restore_the_mode():
    torch.manual_seed(0)
    model = build_model("resnet18", 1, "3x3", (16, 8)).train()
    model.backbone.layer1.eval()
    images = torch.randint(256, (6, 1, 8, 8), dtype=torch.uint8)
    before = {key: value.clone() for key, value in model.state_dict().items()}

    def preprocess(chunk):
        assert len(chunk) <= 4, "preprocessed chunk by chunk"
        return chunk.float() / 255

    together = frozen.extract_features(model.backbone, images, preprocess, batch_size=4)
    alone = torch.cat([frozen.extract_features(model.backbone, image[None], preprocess) for image in images])
    assert together.dtype == torch.float32
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)
    half = frozen.extract_features(model.backbone, images, preprocess, batch_size=4, bfloat16=True)
    torch.testing.assert_close(half, together, rtol=0.1, atol=0.1)
    assert not torch.equal(half, together)
    with pytest.raises(AssertionError, match="chunk by chunk"):
        frozen.extract_features(model.backbone, images, preprocess)
    assert model.backbone.training and model.backbone.layer2.training and not model.backbone.layer1.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_pair_cosines_of_known_views():
    z1, z2 = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[3.0, 0.0], [0.0, -1.0]])
    cosines = frozen.pair_cosines(z1, z2)
    assert sorted(cosines.positive.tolist()) == [-1.0, 1.0]
    assert cosines.negative.tolist() == [0.0] * 4
    assert frozen.pair_cosines(torch.ones(1200, 1), torch.ones(1200, 1)).positive.shape == (1000,)


def test_the_table_has_the_columns_of_its_rows():
    row = probes.evaluate_features(toy_features(noise=0.05), budgets=(2, 10, 1000), draws=3)
    assert row == {
        "linear_2": 100,
        "linear_2_std": 0,
        "linear_10": 100,
        "linear_10_std": 0,
        "linear_all": 100,
        "knn": 100,
    }
    title, header, _, first, second, note = probes.format_table(
        {"a": row, "b": {"knn": 50.0}}, "t", draws=3
    ).splitlines()
    assert title == "t"
    assert [column.strip() for column in re.split("  +", header)[1:]] == [
        "linear, 2/class",
        "linear, 10/class",
        "linear, all",
        "20-NN",
    ]
    assert first.split() == ["a", "100.0", "±", "0.0", "100.0", "±", "0.0", "100.0", "100.0"]
    assert second.split() == ["b", "–", "–", "–", "50.0"]
    assert "over 3 random draws" in note
    assert "over 20 and 5 random" in probes.format_table({"a": {"linear_5": 1.0, "linear_50": 2.0}}, "t")
