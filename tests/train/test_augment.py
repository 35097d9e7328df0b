# SPDX-License-Identifier: Apache-2.0
"""The batched augmentation against torchvision's one-image functions, and its per-sample randomness."""

import math

import pytest
import torch

pytest.importorskip("torchvision")
import torchvision
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as reference

from train.augment import Preprocess, ViewParameters, ViewRanges, apply_parameters, draw_parameters


def neutral(n: int) -> ViewParameters:
    return ViewParameters(window=torch.ones(n, 2), center=torch.zeros(n, 2))


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


COLOUR = {  # step -> torchvision's function of one image and one number, the numbers of four images
    "brightness": (reference.adjust_brightness, [0.2, 0.9, 1.0, 1.7]),
    "contrast": (reference.adjust_contrast, [0.2, 0.9, 1.0, 1.7]),
    "saturation": (reference.adjust_saturation, [0.0, 0.9, 1.0, 1.7]),
    "hue": (reference.adjust_hue, [-0.5, -0.1, 0.0, 0.3]),
    "gamma": (reference.adjust_gamma, [0.5, 1.0, 1.3, 2.0]),
    "blur": (lambda image, sigma: reference.gaussian_blur(image, [5, 5], [sigma, sigma]), [0.1, 0.5, 1.0, 2.0]),
    "grayscale": (lambda image, on: reference.rgb_to_grayscale(image, 3) if on else image, [0, 1, 0, 1]),
    "solarize": (lambda image, on: reference.solarize(image, 0.5) if on else image, [0, 1, 0, 1]),
    "flip": (lambda image, sign: reference.hflip(image) if sign < 0 else image, [1, -1, 1, -1]),
}


@pytest.mark.parametrize("step", COLOUR)
def test_a_step_is_torchvisions_function(step):
    """Each image of the batch with its own number; gray and saturated pixels are among them."""
    function, numbers = COLOUR[step]
    images = random_images(4, channels=3, size=40)
    images[:, :, :8] = images[:, :1, :8]  # gray
    images[:, 0, 8:12], images[:, 1, 8:12], images[:, 2, 12:16] = 1.0, 0.0, 0.0
    if step == "gamma":  # whose slope at 0 is infinite: rounding errors of the interpolation would show
        images = images.clamp(min=0.01)
    parameters = neutral(4)._replace(**{step: torch.tensor(numbers, dtype=torch.float32)})
    views = apply_parameters(images, parameters, 40)
    for view, image, number in zip(views, images, numbers, strict=True):
        torch.testing.assert_close(view, function(image, number), rtol=0, atol=2e-5)
    assert (views - images).abs().amax((1, 2, 3)).max() > 0.1, "the step did nothing"


def test_the_steps_come_in_simclrs_order():
    """Crop, flip, jitter, gray, blur, solarize."""
    images = random_images(1, channels=3, size=40)
    values = {"brightness": 1.3, "contrast": 0.7, "saturation": 1.4, "hue": 0.1, "blur": 0.8, "solarize": 1.0}
    parameters = neutral(1)._replace(**{name: torch.tensor([value]) for name, value in values.items()})
    expected = images[0]
    for name, value in values.items():
        expected = COLOUR[name][0](expected, value)
    torch.testing.assert_close(apply_parameters(images, parameters, 40)[0], expected, rtol=0, atol=1e-4)


def test_every_sample_has_its_own_parameters_within_the_ranges():
    ranges = ViewRanges((0.4, 1.2), 1.5, 0.5, 20, 10, 2, 0.8, 0.3, 0.4, 0.2, 0.1, 0.2, 0.5, 0.3)
    parameters = draw_parameters(4000, ranges, torch.Generator().manual_seed(0))
    window = parameters.window.double()
    drawn = {  # what was drawn, and the interval it must fill
        "area": (window.prod(1), 0.4, 1.2),
        "aspect": ((window[:, 0] / window[:, 1]).log(), -math.log(1.5), math.log(1.5)),
        "rotation": (parameters.rotation, -20, 20),
        "shear": (parameters.shear, -10, 10),
        "gamma": (parameters.gamma.log(), -math.log(2), math.log(2)),
        "brightness": (parameters.brightness, 0.7, 1.3),
        "contrast": (parameters.contrast, 0.6, 1.4),
        "saturation": (parameters.saturation, 0.8, 1.2),
        "hue": (parameters.hue, -0.1, 0.1),
    }
    for name, (values, low, high) in drawn.items():
        assert values.unique().numel() > 3000, f"{name} is shared between samples"
        slack = 1e-5 * (high - low)
        assert low - slack <= values.min() <= low + 0.01 * (high - low), name
        assert high - 0.01 * (high - low) <= values.max() <= high + slack, name
    jittered = [parameters.brightness != 1, parameters.contrast != 1, parameters.saturation != 1, parameters.hue != 0]
    assert torch.stack(jittered).double().std(0).max() == 0, "all of an image's colour is jittered, or none"
    shares = {"jitter": jittered[0], "flip": parameters.flip < 0, "gray": parameters.grayscale == 1}
    shares |= {"blur": parameters.blur > 0, "solarize": parameters.solarize == 1}
    for (name, values), expected in zip(shares.items(), (0.8, 0.5, 0.2, 0.5, 0.3), strict=True):
        assert abs(values.double().mean() - expected) < 0.03, name  # four standard errors
    # A crop smaller than the image stays inside it.
    edge = parameters.center.abs() + parameters.window
    assert edge[parameters.window <= 1].max() <= 1 + 1e-6
    columns = torch.stack([values.double() for values, *_ in drawn.values()][:5])
    correlation = columns.corrcoef() - torch.eye(len(columns))
    assert correlation.abs().max() < 0.08, "parameters of one sample depend on each other"


def test_crops_follow_torchvisions_random_resized_crop():
    """Area and aspect of the accepted tries: means within four standard errors of torchvision's own draws."""
    torch.manual_seed(0)
    image = torch.zeros(3, 1000, 1000)
    crop = torchvision.transforms.RandomResizedCrop
    boxes = torch.tensor([crop.get_params(image, [0.2, 1.0], [3 / 4, 4 / 3]) for _ in range(4000)]).double()
    ours = draw_parameters(4000, ViewRanges(), torch.Generator().manual_seed(0)).window.double()
    for expected, actual in [
        (boxes[:, 2] * boxes[:, 3] / 1e6, ours.prod(1)),
        ((boxes[:, 3] / boxes[:, 2]).log(), (ours[:, 0] / ours[:, 1]).log()),
    ]:
        error = (expected.var() / 4000 + actual.var() / 4000).sqrt()
        assert abs(expected.mean() - actual.mean()) < 4 * error
        assert abs(expected.std() / actual.std() - 1) < 0.06
    assert ours.max() <= 1


def test_views_compile_to_one_graph():
    images = torch.randint(0, 256, (8, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    ranges = ViewRanges(blur=0.5, solarize=0.5, rotation=10, gamma=1.2)
    preprocess = Preprocess(torch.full((3,), 0.5), torch.full((3,), 0.25), 16, ranges)
    parameters = preprocess.draw(8, torch.Generator().manual_seed(0))
    compiled = torch.compile(preprocess.augment, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images, parameters), preprocess.augment(images, parameters))


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
