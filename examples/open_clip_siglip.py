# SPDX-License-Identifier: Apache-2.0
"""open_clip: its SigLipLoss swapped for ours, in its own training loop.

For the whole of open_clip's command line, put the two lines of `swap` into a launcher and call its main:

    from open_clip_train.main import main; main(sys.argv[1:])    # with --siglip, as before
"""

import logging
from types import SimpleNamespace

import open_clip
import torch
from open_clip_train.train import train_one_epoch

from mio_ext import SigLIPLoss

TOWERS = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 8},
    "text_cfg": {"context_length": 8, "vocab_size": 64, "width": 64, "heads": 2, "layers": 1, "no_causal_mask": True},
    "init_logit_scale": 2.3,  # log 10, and a bias: SigLIP's start
    "init_logit_bias": -10.0,
}


def swap() -> None:
    """create_loss(args) of a run with --siglip looks the class up here; it is given rank and world size as before."""
    open_clip.factory.SigLipLoss = SigLIPLoss


def main() -> None:
    torch.manual_seed(0)
    model = open_clip.CLIP(**TOWERS, output_dict=True)
    images, texts = torch.randn(64, 3, 32, 32), torch.randint(1, 64, (64, 8))

    theirs = open_clip.loss.SigLipLoss()
    swap()
    names = {"distill": False, "model": "tiny", "siglip": True, "horovod": False, "rank": 0, "world_size": 1}
    args = SimpleNamespace(**names, loss_dist_impl=None)
    ours = open_clip.create_loss(args)
    out = model(images, texts)
    print(f"SigLipLoss {theirs(**out):.6f}, mio_ext {ours(**out):.6f} ({type(ours).__name__})")

    # The loop asks of a loss no more than loss(**model_out, output_dict=True), so nothing else changes. With
    # accum_freq = 2 it hands over the features of two batches, and our loss sees all their pairs.
    loop = {"precision": "fp32", "accum_freq": 2, "skip_scheduler": True, "grad_clip_norm": None, "wandb": False}
    vars(args).update(device="cpu", batch_size=16, log_every_n_steps=2, local_rank=0, log_local=False, **loop)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, texts), batch_size=16)
    loader.num_batches, loader.num_samples = len(loader), len(images)
    data = {"train": SimpleNamespace(dataloader=loader, set_epoch=lambda epoch: None)}
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for epoch in range(6):
        train_one_epoch(model, data, ours, epoch, optimizer, None, None, None, args)
    print(f"loss of all pairs {ours(**out):.3f} before, {ours(**model(images, texts)):.3f} after 6 epochs")


if __name__ == "__main__":
    main()
