# SPDX-License-Identifier: Apache-2.0
"""PyTorch Lightning: a module that learns the loss's temperature too, logs what the loss knows, and runs under DDP."""

import math

import lightning
import torch
from torch import nn

from mio_ext.distributed import mio_loss  # without a process group: the loss of this process's batch

torch.manual_seed(0)


class TwoViewModule(lightning.LightningModule):
    def __init__(self, dim: int = 16) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(dim, 64), nn.ReLU(), nn.Linear(64, 32))
        self.log_temperature = nn.Parameter(torch.tensor(math.log(0.5)))  # its logarithm, so that it stays positive

    def training_step(self, batch: list[torch.Tensor], index: int) -> torch.Tensor:
        z1, z2 = (self.encoder(view) for view in batch)
        # Statistics cost nothing: they come from the same pass. Under strategy="ddp" loss and statistics are those of
        # the batches of all processes as one, and the averaged gradient is exactly that loss's. With precision
        # "bf16-mixed" z1 and z2 are bfloat16, and the logits are still summed in float32.
        loss, stats = mio_loss(z1, z2, temperature=self.log_temperature.exp(), return_stats=True)
        self.log_dict(
            {
                "loss": loss,
                "positive cosine": stats.positive_cosine,
                "negative cosine": stats.negative_cosine,
                "temperature": self.log_temperature.exp(),
            }
        )
        return loss

    def on_train_epoch_end(self) -> None:
        values = self.trainer.callback_metrics
        print(", ".join(f"{name} {value:.3f}" for name, value in values.items()))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def main() -> None:
    x = torch.randn(256, 16)
    views = torch.utils.data.TensorDataset(x + 0.3 * torch.randn_like(x), x + 0.3 * torch.randn_like(x))
    loader = torch.utils.data.DataLoader(views, batch_size=64, shuffle=True, drop_last=True)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    # Two processes: devices=2, strategy="ddp".
    trainer = lightning.Trainer(max_epochs=6, accelerator="cpu", devices=1, enable_model_summary=False, **quiet)
    trainer.fit(TwoViewModule(), loader)


if __name__ == "__main__":
    main()
