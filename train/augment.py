# SPDX-License-Identifier: Apache-2.0
"""Batched augmentation in plain torch, on the device of the images, with its own parameters per sample.

Drawing the parameters and applying them are two steps: the second is a pure function of tensors, which
is what tests and a compiler want. All geometry is one affine map per sample and one ``grid_sample``. Each
step is torchvision's function of the same name; torchvision itself draws one set for a whole batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

CROP_TRIES = 10  #: as torchvision's RandomResizedCrop
BLUR_SIGMA = (0.1, 2.0)  #: pixels, as in SimCLR
SOLARIZE_THRESHOLD = 0.5
LUMA = (0.2989, 0.587, 0.114)  #: weights of red, green and blue in a gray value (ITU-R 601-2)


class ViewParameters(NamedTuple):
    """One view per row, float32 [n] or [n, 2]; neutral values in parentheses, None: the step is left out."""

    window: Tensor  #: [n, 2] width and height of the crop as a fraction of the image (1)
    center: Tensor  #: [n, 2] x, y of its centre, in [-1, 1] coordinates of the image (0)
    flip: Tensor | None = None  #: -1 where mirrored (1)
    rotation: Tensor | None = None  #: degrees, clockwise on the screen (0)
    shear: Tensor | None = None  #: degrees along x (0)
    brightness: Tensor | None = None  #: factor (1)
    contrast: Tensor | None = None  #: factor (1)
    saturation: Tensor | None = None  #: factor (1)
    hue: Tensor | None = None  #: turns around the colour wheel (0)
    grayscale: Tensor | None = None  #: 1 where the colour is dropped (0)
    gamma: Tensor | None = None  #: exponent on the intensity: below 1 thickens strokes, above 1 thins them (1)
    blur: Tensor | None = None  #: standard deviation in pixels, 0 where not blurred (0)
    solarize: Tensor | None = None  #: 1 where bright pixels are inverted (0)

    def rows(self, index: Tensor) -> ViewParameters:
        return self._replace(**{name: v[index] for name, v in self._asdict().items() if v is not None})


@dataclass(frozen=True)
class ViewRanges:
    """What is drawn for every view; the "views" options of train/config.py, whose defaults these are."""

    crop_area: tuple[float, float] = (0.2, 1.0)  #: share of the image's area; above 1: with a black margin
    crop_aspect: float = 4 / 3
    flip: float = 0.5
    rotation: float = 0.0
    shear: float = 0.0
    gamma: float = 1.0
    jitter: float = 0.8
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.4
    hue: float = 0.1
    grayscale: float = 0.1
    blur: float = 0.0
    solarize: float = 0.0

    @property
    def leaves_image(self) -> bool:
        return self.crop_area[1] > 1 or self.rotation > 0 or self.shear > 0


def draw_parameters(n: int, ranges: ViewRanges, generator: torch.Generator, channels: int = 3) -> ViewParameters:
    """Parameters of ``n`` views, independent of each other, on the generator's device."""

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        sample = torch.rand(n, *shape, generator=generator, device=generator.device)
        return low + (high - low) * sample

    def around(neutral: float, spread: float, where: Tensor | None = None) -> Tensor | None:
        if spread == 0:
            return None
        values = uniform(neutral - spread, neutral + spread)
        return values if where is None else torch.where(where, values, neutral)

    def happens(probability: float) -> Tensor | None:
        return None if probability == 0 else (uniform(0, 1) < probability).float()

    window = draw_windows(ranges, uniform)
    # The crop stays inside the image, or the image inside the crop where that is the larger one.
    center = uniform(-1, 1, 2) * (1 - window).abs()
    flip, gray, colour = happens(ranges.flip), happens(ranges.grayscale), channels == 3
    jitter, blur = uniform(0, 1) < ranges.jitter, happens(ranges.blur)
    log_gamma = around(0, math.log(ranges.gamma))
    return ViewParameters(
        window=window,
        center=center,
        flip=None if flip is None else 1 - 2 * flip,
        rotation=around(0, ranges.rotation),
        shear=around(0, ranges.shear),
        brightness=around(1, ranges.brightness, jitter),
        contrast=around(1, ranges.contrast, jitter),
        saturation=around(1, ranges.saturation, jitter) if colour else None,
        hue=around(0, ranges.hue, jitter) if colour else None,
        grayscale=gray if colour else None,
        gamma=None if log_gamma is None else log_gamma.exp(),
        blur=None if blur is None else blur * uniform(*BLUR_SIGMA),
        solarize=happens(ranges.solarize),
    )


def draw_windows(ranges: ViewRanges, uniform: Callable[..., Tensor]) -> Tensor:
    """[n, 2] width and height of a crop: of several tries the first that fits, as torchvision."""
    area = uniform(*ranges.crop_area, CROP_TRIES)
    log_aspect = math.log(ranges.crop_aspect)
    aspect = uniform(-log_aspect, log_aspect, CROP_TRIES).exp()
    tries = torch.stack([(area * aspect).sqrt(), (area / aspect).sqrt()], dim=2)
    limit = 1.0 if ranges.crop_area[1] <= 1 else math.inf
    first = (tries <= limit).all(2).int().argmax(1)
    return tries[torch.arange(len(tries), device=tries.device), first].clamp(max=limit)


def affine_matrix(parameters: ViewParameters) -> Tensor:
    """[n, 2, 3] maps from output to input coordinates: centre + window · shear · rotation · flip · xy."""
    window = parameters.window
    zero = torch.zeros_like(window[:, 0])
    angle = zero if parameters.rotation is None else torch.deg2rad(parameters.rotation)
    tangent = zero if parameters.shear is None else torch.tan(torch.deg2rad(parameters.shear))
    flip = zero + 1 if parameters.flip is None else parameters.flip
    cos, sin = angle.cos(), angle.sin()
    # shear · rotation · flip, [[1, t], [0, 1]] · [[cos, sin], [-sin, cos]] · [[f, 0], [0, 1]]
    linear = [(cos - tangent * sin) * flip, sin + tangent * cos, -sin * flip, cos]
    return torch.cat(
        [window[:, :, None] * torch.stack(linear, dim=1).view(-1, 2, 2), parameters.center[:, :, None]], dim=2
    )


def luma(images: Tensor) -> Tensor:
    """[n, 1, H, W] gray values; of gray images, themselves."""
    if images.shape[1] == 1:
        return images
    red, green, blue = images.unbind(1)
    return (LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue)[:, None]


def blend(images: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    """``other`` at factor 0, ``images`` at 1, beyond it above 1."""
    factor = factor.view(-1, 1, 1, 1)
    return (factor * images + (1 - factor) * other).clamp(0, 1)


def shift_hue(images: Tensor, shift: Tensor) -> Tensor:
    """Turn the hue of RGB images [n, 3, H, W] by ``shift`` [n] of a full turn, through HSV."""
    red, green, blue = images.unbind(1)
    value, low = images.amax(1), images.amin(1)
    chroma = value - low
    safe = torch.where(chroma == 0, 1, chroma)
    sector = torch.where(
        value == red,
        (green - blue) / safe,
        torch.where(value == green, 2 + (blue - red) / safe, 4 + (red - green) / safe),
    )  # hue in sixths of a turn
    sector = sector + 6 * shift.view(-1, 1, 1)

    def channel(offset: int) -> Tensor:
        k = (sector + offset) % 6
        return value - chroma * torch.minimum(k, 4 - k).clamp(0, 1)

    return torch.stack([channel(5), channel(3), channel(1)], dim=1).clamp(0, 1)


def gaussian_blur(images: Tensor, sigma: Tensor) -> Tensor:
    """Separable, reflected at the border, with a kernel of a tenth of the image (9 at 96 pixels)."""
    radius = max(images.shape[-1] // 20, 1)
    taps = torch.arange(-radius, radius + 1, device=images.device)
    # sigma 0 is a unit impulse: its other taps underflow to exactly 0.
    weights = torch.exp(-0.5 * (taps / sigma.clamp(min=1e-3)[:, None]).square())
    weights = (weights / weights.sum(1, keepdim=True)).view(-1, len(taps), 1, 1, 1)
    padded = F.pad(images, (radius,) * 4, mode="reflect")
    height, width = images.shape[-2:]
    rows = sum((weights[:, t] * padded[:, :, t : t + height] for t in range(len(taps))), start=images.new_zeros(()))
    return sum((weights[:, t] * rows[..., t : t + width] for t in range(len(taps))), start=images.new_zeros(()))


def apply_parameters(images: Tensor, parameters: ViewParameters, size: int, outside: str = "zeros") -> Tensor:
    """Views [n, C, size, size] of images [n, C, H, W], both float32 in [0, 1].

    ``outside`` is grid_sample's padding: "zeros" for views that may leave the image, else "border",
    which is what a crop followed by a resize does at the image's edge.
    """
    n, channels = images.shape[:2]
    grid = F.affine_grid(affine_matrix(parameters), [n, channels, size, size], align_corners=False)
    views = F.grid_sample(images, grid, mode="bilinear", padding_mode=outside, align_corners=False)
    views = views.clamp(0, 1)  # interpolation may overshoot by a rounding error, and pow() makes it a NaN
    p = parameters
    if p.gamma is not None:
        views = views.pow(p.gamma.view(-1, 1, 1, 1))
    if p.brightness is not None:
        views = (views * p.brightness.view(-1, 1, 1, 1)).clamp(0, 1)
    if p.contrast is not None:
        views = blend(views, luma(views).mean((1, 2, 3), keepdim=True), p.contrast)
    if p.saturation is not None:
        views = blend(views, luma(views), p.saturation)
    if p.hue is not None:
        views = shift_hue(views, p.hue)
    if p.grayscale is not None:
        views = torch.where(p.grayscale.view(-1, 1, 1, 1) > 0, luma(views), views)
    if p.blur is not None:
        views = gaussian_blur(views, p.blur)
    if p.solarize is not None:
        inverted = torch.where(views >= SOLARIZE_THRESHOLD, 1 - views, views)
        views = torch.where(p.solarize.view(-1, 1, 1, 1) > 0, inverted, views)
    return views


class Preprocess:
    """From resident uint8 images to normalised network input: augmented views, or the plain image.

    ``mean`` and ``std`` [C] are of the train split on the scale [0, 1]; ``size`` is in pixels.
    """

    def __init__(self, mean: Tensor, std: Tensor, size: int, ranges: ViewRanges) -> None:
        self.mean, self.std = mean.view(-1, 1, 1), std.view(-1, 1, 1)
        self.size, self.ranges = size, ranges
        self.outside = "zeros" if ranges.leaves_image else "border"
        self.function: Callable[[Tensor, ViewParameters], Tensor] = self.augment

    def compile(self) -> None:
        self.function = torch.compile(self.augment, fullgraph=True, dynamic=False)

    def draw(self, n: int, generator: torch.Generator) -> ViewParameters:
        return draw_parameters(n, self.ranges, generator, channels=len(self.mean))

    def augment(self, images: Tensor, parameters: ViewParameters) -> Tensor:
        return self.normalize(apply_parameters(images.float() / 255, parameters, self.size, self.outside))

    def views(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """One random view of each image: [n, C, H, W] uint8 to [n, C, size, size] float32."""
        return self.augment(images, self.draw(len(images), generator))

    def plain(self, images: Tensor) -> Tensor:
        """The image itself, scaled to the training size."""
        scaled = images.float() / 255
        if images.shape[-1] != self.size:
            scaled = F.interpolate(scaled, size=(self.size, self.size), mode="bilinear", antialias=True)
        return self.normalize(scaled)

    def normalize(self, images: Tensor) -> Tensor:
        return ((images - self.mean) / self.std).contiguous(memory_format=torch.channels_last)
