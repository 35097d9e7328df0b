# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: E402  (the repository root goes on the path before the imports that need it)
"""The batched augmentation against torchvision's one-image functions, and its per-sample randomness."""

import math
import sys
from pathlib import Path

import pytest
import torch

torchvision = pytest.importorskip("torchvision")
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as reference

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from train.augment import Preprocess, ViewParameters, ViewRanges, apply_parameters, draw_parameters


def neutral(n: int) -> ViewParameters:
    zero, one = torch.zeros(n), torch.ones(n)
    return ViewParameters(
        window=torch.ones(n, 2), center=torch.zeros(n, 2), rotation=zero, shear=zero, gain=one, gamma=one
    )


def random_images(n: int, channels: int = 1, size: int = 8) -> torch.Tensor:
    return torch.rand(n, channels, size, size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("channels", [1, 3])
def test_neutral_parameters_change_nothing(channels):
    images = random_images(5, channels)
    torch.testing.assert_close(apply_parameters(images, neutral(5), 8), images, rtol=0, atol=1e-6)


def test_geometry_is_torchvisions_affine():
    """Rotation, shear, zoom and shift together, another set for each image of the batch."""
    n, size = 16, 12
    images = random_images(n, size=size)
    generator = torch.Generator().manual_seed(1)
    angle, shear = 40 * torch.rand(n, generator=generator) - 20, 40 * torch.rand(n, generator=generator) - 20
    zoom = 0.7 + 0.8 * torch.rand(n, generator=generator)
    shift = torch.randint(-3, 4, (n, 2), generator=generator)

    parameters = neutral(n)._replace(rotation=angle, shear=shear, window=(1 / zoom)[:, None].repeat(1, 2))
    # torchvision shifts the output, a crop's centre is a point of the input: c = -A shift.
    radians, tangent = torch.deg2rad(angle), torch.tan(torch.deg2rad(shear))
    x, y = shift[:, 0] * 2 / size, shift[:, 1] * 2 / size
    rotated_x = radians.cos() * x + radians.sin() * y
    rotated_y = -radians.sin() * x + radians.cos() * y
    center = -torch.stack([rotated_x + tangent * rotated_y, rotated_y], dim=1) / zoom[:, None]
    views = apply_parameters(images, parameters._replace(center=center), size)

    for i in range(n):
        expected = reference.affine(
            images[i],
            angle=float(angle[i]),
            translate=shift[i].tolist(),
            scale=float(zoom[i]),
            shear=[float(shear[i]), 0.0],
            interpolation=InterpolationMode.BILINEAR,
        )
        torch.testing.assert_close(views[i], expected, rtol=0, atol=2e-5)


def test_a_window_is_torchvisions_resized_crop():
    """A crop of 4 x 6 pixels out of 8 x 8; equal where neither reads beyond the crop's edge."""
    image = random_images(1)
    top, left, height, width = 1, 2, 4, 6
    parameters = neutral(1)._replace(
        window=torch.tensor([[width / 8, height / 8]]),
        center=torch.tensor([[(left + width / 2) / 4 - 1, (top + height / 2) / 4 - 1]]),
    )
    expected = reference.resized_crop(image, top, left, height, width, [16, 16], antialias=False)
    inner = slice(2, 14)
    view = apply_parameters(image, parameters, 16)
    torch.testing.assert_close(view[..., inner, inner], expected[..., inner, inner], rtol=0, atol=1e-5)


def test_intensity_is_gamma_then_gain():
    images = random_images(2)
    parameters = neutral(2)._replace(gain=torch.tensor([0.5, 3.0]), gamma=torch.tensor([2.0, 1.0]))
    views = apply_parameters(images, parameters, 8)
    torch.testing.assert_close(views[0], 0.5 * images[0].square(), rtol=0, atol=1e-6)
    torch.testing.assert_close(views[1], (3 * images[1]).clamp(max=1), rtol=0, atol=1e-5)


def test_every_sample_has_its_own_parameters_within_the_ranges():
    ranges = ViewRanges(area=(0.4, 1.2), aspect=1.5, rotation=20, shear=10, gain=0.3, gamma=2)
    parameters = draw_parameters(4000, ranges, torch.Generator().manual_seed(0))
    window = parameters.window.double()
    drawn = {  # what was drawn, and the interval it must fill
        "area": (window.prod(1), 0.4, 1.2),
        "aspect": ((window[:, 0] / window[:, 1]).log(), -math.log(1.5), math.log(1.5)),
        "rotation": (parameters.rotation, -20, 20),
        "shear": (parameters.shear, -10, 10),
        "gain": (parameters.gain, 0.7, 1.3),
        "gamma": (parameters.gamma.log(), -math.log(2), math.log(2)),
    }
    for name, (values, low, high) in drawn.items():
        assert values.unique().numel() > 3900, f"{name} is shared between samples"
        slack = 1e-5 * (high - low)
        assert low - slack <= values.min() <= low + 0.01 * (high - low), name
        assert high - 0.01 * (high - low) <= values.max() <= high + slack, name
    # A crop smaller than the image stays inside it.
    edge = parameters.center.abs() + parameters.window
    assert edge[parameters.window <= 1].max() <= 1 + 1e-6

    columns = torch.stack([values.double() for values, *_ in drawn.values()])
    correlation = columns.corrcoef() - torch.eye(len(columns))
    assert correlation.abs().max() < 0.08, "parameters of one sample depend on each other"


def test_views_differ_between_copies_and_repeat_with_the_seed():
    images = random_images(1).mul(255).to(torch.uint8).repeat(8, 1, 1, 1)
    preprocess = Preprocess(torch.tensor([0.5]), torch.tensor([0.25]), 8, ViewRanges())
    first, again, other = (preprocess.views(images, torch.Generator().manual_seed(seed)) for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.pdist(first.flatten(1)).min() > 0.1


def test_views_stay_in_the_range_of_the_images():
    images = torch.randint(0, 256, (256, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mean, std = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.5, 0.25, 2.0])
    views = Preprocess(mean, std, 16, ViewRanges()).views(images, torch.Generator().manual_seed(0))
    pixels = views * std.view(-1, 1, 1) + mean.view(-1, 1, 1)
    assert pixels.isfinite().all()
    assert -1e-5 <= pixels.min() <= 0.01
    assert 0.99 <= pixels.max() <= 1 + 1e-5


def test_plain_images_are_scaled_and_normalised():
    images = torch.tensor([[0, 255], [51, 102]], dtype=torch.uint8).view(1, 1, 2, 2)
    preprocess = Preprocess(torch.tensor([0.2]), torch.tensor([0.5]), 2, ViewRanges())
    expected = (torch.tensor([[0.0, 1.0], [0.2, 0.4]]) - 0.2) / 0.5
    torch.testing.assert_close(preprocess.plain(images)[0, 0], expected)
