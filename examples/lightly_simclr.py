# SPDX-License-Identifier: Apache-2.0
"""lightly: its SimCLR recipe (backbone, projection head, two views) with MIOLoss where NTXentLoss stood."""

import torch
import torchvision
from lightly.models.modules import SimCLRProjectionHead
from lightly.transforms import SimCLRTransform
from torch import nn
from torchvision.transforms.functional import to_pil_image

from mio_ext import MIOLoss


class SimCLR(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        resnet = torchvision.models.resnet18(weights=None)
        self.backbone = nn.Sequential(*list(resnet.children())[:-1])
        self.projection_head = SimCLRProjectionHead(512, 512, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.projection_head(self.backbone(x).flatten(start_dim=1))


class TwoViews(torch.utils.data.Dataset):
    """Made-up images; of a folder of yours LightlyDataset(folder, transform=transform) gives the same pairs."""

    def __init__(self, count: int, transform: SimCLRTransform) -> None:
        images = nn.functional.interpolate(torch.rand(count, 3, 2, 2), size=32, mode="bilinear")
        self.images, self.transform = [to_pil_image(image) for image in images], transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[list[torch.Tensor], int]:
        return self.transform(self.images[index]), 0


def main() -> None:
    torch.manual_seed(0)
    model = SimCLR()
    data = TwoViews(64, SimCLRTransform(input_size=32, gaussian_blur=0.0, cj_strength=0.2))
    loader = torch.utils.data.DataLoader(data, batch_size=32, shuffle=True, drop_last=True)
    # Was: NTXentLoss(temperature=0.5). The features go in as they are; ours too divides them by their norms. Under
    # DDP both take gather_distributed=True.
    criterion = MIOLoss(temperature=0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.06, momentum=0.9)
    for epoch in range(6):
        losses = []
        for (view0, view1), _ in loader:
            loss = criterion(model(view0), model(view1))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        print(f"epoch {epoch}: loss {sum(losses) / len(losses):.3f}")


if __name__ == "__main__":
    main()
