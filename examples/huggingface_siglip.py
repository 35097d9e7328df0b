# SPDX-License-Identifier: Apache-2.0
"""Hugging Face: SiglipModel trained by Trainer on our loss, which its own `return_loss=True` would have as a matrix."""

import tempfile

import torch
from transformers import SiglipConfig, SiglipModel, Trainer, TrainingArguments

from mio_ext import siglip_loss

TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
CONFIG = SiglipConfig(
    text_config={**TOWER, "vocab_size": 64, "max_position_embeddings": 8, "projection_size": 32},
    vision_config={**TOWER, "image_size": 32, "patch_size": 8},
)


class SiglipTrainer(Trainer):
    """compute_loss, not compute_loss_func: the latter is not given the model, whose scale and bias the loss learns."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        out = model(**inputs)
        bare = self.accelerator.unwrap_model(model)  # DistributedDataParallel hides its parameters
        # On several GPUs: the same call from mio_ext.distributed takes the pairs of all of them.
        loss = siglip_loss(out.image_embeds, out.text_embeds, bare.logit_scale.exp(), bare.logit_bias)
        return (loss, out) if return_outputs else loss


class Pairs(torch.utils.data.Dataset):
    """Random images with random texts: what can be learnt is which belongs to which."""

    def __len__(self):
        return 64

    def __getitem__(self, index):
        random = torch.Generator().manual_seed(index)
        image, text = torch.randn(3, 32, 32, generator=random), torch.randint(0, 64, (8,), generator=random)
        return {"pixel_values": image, "input_ids": text}


def main() -> None:
    torch.manual_seed(0)
    model = SiglipModel(CONFIG)
    model.logit_scale.data.fill_(2.3)  # log 10: a new SiglipModel starts its scale and bias at random
    model.logit_bias.data.fill_(-10.0)
    batch = torch.utils.data.default_collate([Pairs()[i] for i in range(16)])
    out = model(**batch, return_loss=True)
    ours = siglip_loss(out.image_embeds, out.text_embeds, model.logit_scale.exp(), model.logit_bias)
    print(f"return_loss=True {out.loss:.6f}, mio_ext {ours:.6f}")
    with tempfile.TemporaryDirectory() as folder:
        how = {"per_device_train_batch_size": 16, "num_train_epochs": 8, "learning_rate": 3e-3, "use_cpu": True}
        quiet = {"logging_strategy": "epoch", "save_strategy": "no", "report_to": [], "disable_tqdm": True}
        trainer = SiglipTrainer(model, TrainingArguments(folder, **how, **quiet), train_dataset=Pairs())
        trainer.train()
    for entry in trainer.state.log_history[:-1]:
        print(f"epoch {entry['epoch']:.0f}: loss {float(entry['loss']):.3f}")


if __name__ == "__main__":
    main()
