# SPDX-License-Identifier: Apache-2.0

"""Fine-tuning and the paper's linear evaluation on toy images: stripes along one axis or the other."""

from dataclasses import replace

import pytest
import torch
from torch import nn

pytest.importorskip("torchvision")
pytest.importorskip("sklearn")

from train import classifier
from train.classifier import FINETUNE, V1, train_classifier
from train.data import Split

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")


class Scaling:
    """Stands in for train.augment.Preprocess: uint8 to [0, 1], views flipped at random; counts its calls."""

    def __init__(self):
        self.plain_images, self.view_batches = 0, []

    def plain(self, images):
        self.plain_images += len(images)
        return images.float() / 255

    def views(self, images, generator):
        self.view_batches.append(len(images))
        flip = torch.rand(len(images), generator=generator) < 0.5
        return torch.where(flip[:, None, None, None], images.flip(3), images).float() / 255


def stripes(n: int, seed: int) -> Split:
    """Class 0: horizontal stripes, class 1: vertical ones, 8x8, with noise and a random phase."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 2
    wave = (torch.arange(8) + torch.randint(4, (n, 1), generator=generator)) % 4 < 2
    images = wave[:, :, None].expand(n, 8, 8)
    images = torch.where(labels[:, None, None] == 1, images.mT, images) * 120
    noise = torch.randint(100, (n, 8, 8), generator=generator)
    return Split((images + noise).to(torch.uint8)[:, None], labels)


def small_backbone(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )


@pytest.fixture
def trained(monkeypatch):
    """The classifiers that a test trained."""
    models, build = [], classifier.build_classifier

    def keep(*arguments):
        models.append(build(*arguments))
        return models[-1]

    monkeypatch.setattr(classifier, "build_classifier", keep)
    return models


TRAIN, TEST = stripes(320, 0), stripes(200, 1)


def test_finetuning_learns_and_leaves_the_given_backbone_alone(trained):
    backbone, preprocess, augmented, lines = small_backbone(), Scaling(), Scaling(), []
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    settings = replace(FINETUNE, epochs=8, batch_size=32)
    untrained = train_classifier(
        backbone, TRAIN, TEST, preprocess, settings=replace(settings, learning_rate=1e-9), device=CPU
    )
    result = train_classifier(
        backbone, TRAIN, TEST, preprocess, settings=settings, device=CPU, augmented=augmented, progress=lines.append
    )
    assert result.accuracy > 0.95 > 0.8 > untrained.accuracy
    assert (result.epochs_run, result.holdout_accuracy) == (8, None)
    assert augmented.view_batches == [32] * 80 and augmented.plain_images == 0
    assert len(lines) == 8 and lines[-1].startswith("epoch 8/8  loss 0.")
    assert backbone.training and all(p.requires_grad for p in backbone.parameters())
    assert all(torch.equal(value, before[key]) for key, value in backbone.state_dict().items())
    assert not torch.equal(trained[1].backbone[0].weight, backbone[0].weight)
    again = train_classifier(backbone, TRAIN, TEST, preprocess, settings=settings, device=CPU, augmented=Scaling())
    assert again == result


@pytest.mark.parametrize("batch_norm_train", [True, False])
def test_v1_freezes_the_encoder_and_batch_norm_as_the_switch_says(batch_norm_train, trained):
    backbone = small_backbone()
    settings = replace(V1, epochs=2, batch_norm_train=batch_norm_train)
    result = train_classifier(backbone, TRAIN, TEST, Scaling(), settings=settings, device=CPU)
    assert result.epochs_run == 2 and result.holdout_accuracy is not None
    moved = {
        key: not torch.equal(value, backbone.state_dict()[key])
        for key, value in trained[0].backbone.state_dict().items()
    }
    assert moved == {key: batch_norm_train and key in STATISTICS for key in moved}


STATISTICS = ("1.running_mean", "1.running_var", "1.num_batches_tracked")


def test_v1_holds_out_a_fifth_and_drops_the_last_test_images():
    augmented, preprocess = Scaling(), Scaling()
    settings = replace(V1, epochs=1)
    train_classifier(small_backbone(), TRAIN, TEST, preprocess, settings=settings, device=CPU, augmented=augmented)
    assert augmented.view_batches == [32] * (256 // 32)
    assert preprocess.plain_images == 1 + 64 + 192  # one to measure the width, a fifth of 320, 200 // 32 * 32
    preprocess.plain_images = 0
    settings = replace(settings, drop_last_test=False)
    train_classifier(small_backbone(), TRAIN, TEST, preprocess, settings=settings, device=CPU, augmented=augmented)
    assert preprocess.plain_images == 1 + 64 + 200
    assert 10_000 // V1.batch_size * V1.batch_size == 9984  # CIFAR-10's test split in the paper's notebook


def test_the_epoch_of_the_lowest_validation_loss_is_scored(monkeypatch):
    """Losses 3, 1, 2, 2, …: with a patience of 3 the run stops after epoch 6 and scores epoch 2."""
    epochs, scored = [], []

    def train_epoch(model, optimizer, split, order, view, epoch, settings, device):
        epochs.append(epoch)
        nn.init.constant_(model.head.bias, epoch)
        return 0.0

    def score(model, split, preprocess, device, bfloat16):
        epoch = int(model.head.bias[0])
        scored.append((epoch, len(split)))
        return epoch / 10, {1: 3.0, 2: 1.0}.get(epoch, 2.0)

    monkeypatch.setattr(classifier, "train_epoch", train_epoch)
    monkeypatch.setattr(classifier, "score", score)
    result = train_classifier(
        small_backbone(), TRAIN, TEST, Scaling(), settings=replace(V1, epochs=20, patience=3), device=CPU
    )
    assert epochs == [1, 2, 3, 4, 5, 6]
    assert result == (0.2, 6, 0.2)
    assert scored[-1] == (2, 192) and all(size == 64 for _, size in scored[:-1])  # the test split once


def test_the_label_fraction_is_stratified(monkeypatch):
    orders = []
    monkeypatch.setattr(classifier, "train_epoch", lambda *arguments: orders.append(arguments[3]) or 0.0)
    settings = replace(FINETUNE, epochs=2, label_fraction=0.1)
    train_classifier(small_backbone(), TRAIN, TEST, Scaling(), settings=settings, device=CPU)
    assert TRAIN.labels[orders[0]].bincount().tolist() == [16, 16]
    assert sorted(orders[0].tolist()) == sorted(orders[1].tolist()) and not torch.equal(*orders)
    train_classifier(small_backbone(), TRAIN, TEST, Scaling(), settings=replace(settings, seed=1), device=CPU)
    assert sorted(orders[2].tolist()) != sorted(orders[0].tolist())


def test_learning_rates_of_both_schedules():
    assert classifier.learning_rate(1, 0.0, V1) == 0.01
    assert classifier.learning_rate(3, 0.5, V1) == pytest.approx(0.01 * 0.98**2)
    assert classifier.learning_rate(1, 0.0, FINETUNE) == FINETUNE.learning_rate
    assert classifier.learning_rate(9, 0.5, FINETUNE) == pytest.approx(FINETUNE.learning_rate / 2)


def test_too_few_images_are_refused():
    with pytest.raises(ValueError, match="at least two images to train on"):
        train_classifier(small_backbone(), stripes(1, 0), TEST, Scaling(), settings=FINETUNE, device=CPU)
    with pytest.raises(ValueError, match="some to validate and test on"):
        train_classifier(small_backbone(), TRAIN, stripes(20, 1), Scaling(), settings=V1, device=CPU)
