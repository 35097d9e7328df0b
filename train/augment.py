# SPDX-License-Identifier: Apache-2.0
"""Batched augmentation in plain torch, on the device of the images, with its own parameters per sample.

Drawing the parameters and applying them are two steps: the second is a pure function of tensors, which
is what tests (and a compiler) want. All geometry is one affine map per sample and one ``grid_sample``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class ViewParameters(NamedTuple):
    """One view per row; neutral values in parentheses. Every field is [n] or [n, 2], float32."""

    window: Tensor  #: [n, 2] width and height of the crop as a fraction of the image (1)
    center: Tensor  #: [n, 2] x, y of its centre, in [-1, 1] coordinates of the image (0)
    rotation: Tensor  #: [n] degrees, clockwise on the screen (0)
    shear: Tensor  #: [n] degrees along x (0)
    gain: Tensor  #: [n] factor on the intensity (1)
    gamma: Tensor  #: [n] exponent on the intensity: below 1 thickens strokes, above 1 thins them (1)


@dataclass(frozen=True)
class ViewRanges:
    """What is drawn for every view. The defaults suit small gray digits: no flip, moderate geometry."""

    area: tuple[float, float] = (0.5, 1.1)  #: area of the crop as a fraction of the image; above 1 pads
    aspect: float = 4 / 3  #: aspect ratio of the crop, log-uniform in [1/aspect, aspect]
    rotation: float = 15.0  #: degrees either way
    shear: float = 15.0  #: degrees either way
    gain: float = 0.4  #: intensity factor in [1 - gain, 1 + gain]
    gamma: float = 1.5  #: exponent, log-uniform in [1/gamma, gamma]


def draw_parameters(n: int, ranges: ViewRanges, generator: torch.Generator) -> ViewParameters:
    """Parameters of ``n`` views, independent of each other, on the generator's device."""

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        sample = torch.rand(n, *shape, generator=generator, device=generator.device)
        return low + (high - low) * sample

    area = uniform(*ranges.area)
    aspect = uniform(-math.log(ranges.aspect), math.log(ranges.aspect)).exp()
    window = torch.stack([(area * aspect).sqrt(), (area / aspect).sqrt()], dim=1)
    return ViewParameters(
        window=window,
        # The crop stays inside the image, or the image inside the crop where that is the larger one.
        center=uniform(-1, 1, 2) * (1 - window).abs(),
        rotation=uniform(-ranges.rotation, ranges.rotation),
        shear=uniform(-ranges.shear, ranges.shear),
        gain=uniform(1 - ranges.gain, 1 + ranges.gain),
        gamma=uniform(-math.log(ranges.gamma), math.log(ranges.gamma)).exp(),
    )


def affine_matrix(parameters: ViewParameters) -> Tensor:
    """[n, 2, 3] maps from output to input coordinates: centre + window · shear · rotation · xy."""
    angle, tangent = torch.deg2rad(parameters.rotation), torch.tan(torch.deg2rad(parameters.shear))
    cos, sin = angle.cos(), angle.sin()
    # shear · rotation, [[1, t], [0, 1]] · [[cos, sin], [-sin, cos]]
    linear = torch.stack([cos - tangent * sin, sin + tangent * cos, -sin, cos], dim=1).view(-1, 2, 2)
    return torch.cat([parameters.window[:, :, None] * linear, parameters.center[:, :, None]], dim=2)


def apply_parameters(images: Tensor, parameters: ViewParameters, size: int) -> Tensor:
    """Views [n, C, size, size] of images [n, C, H, W], both float32 in [0, 1]; outside the image is 0."""
    n, channels = images.shape[:2]
    grid = F.affine_grid(affine_matrix(parameters), [n, channels, size, size], align_corners=False)
    views = F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    gain, gamma = parameters.gain.view(-1, 1, 1, 1), parameters.gamma.view(-1, 1, 1, 1)
    # Interpolation may overshoot [0, 1] by a rounding error, and pow() of a negative number is NaN.
    return (views.clamp(0, 1).pow(gamma) * gain).clamp(0, 1)


class Preprocess:
    """From resident uint8 images to normalised network input: augmented views, or the plain image."""

    def __init__(self, mean: Tensor, std: Tensor, size: int, ranges: ViewRanges) -> None:
        self.mean, self.std = mean.view(-1, 1, 1), std.view(-1, 1, 1)
        self.size, self.ranges = size, ranges

    def views(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """One random view of each image: [n, C, H, W] uint8 to [n, C, size, size] float32."""
        parameters = draw_parameters(images.shape[0], self.ranges, generator)
        return self.normalize(apply_parameters(images.float() / 255, parameters, self.size))

    def plain(self, images: Tensor) -> Tensor:
        """The image itself, scaled to the training size."""
        scaled = F.interpolate(images.float() / 255, size=(self.size, self.size), mode="bilinear")
        return self.normalize(scaled)

    def normalize(self, images: Tensor) -> Tensor:
        return ((images - self.mean) / self.std).contiguous(memory_format=torch.channels_last)
