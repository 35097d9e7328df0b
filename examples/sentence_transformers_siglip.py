# SPDX-License-Identifier: Apache-2.0
"""sentence-transformers: SiglipLoss for its trainer, on (anchor, positive) pairs with or without hard negatives."""

import tempfile
from collections.abc import Iterable
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn

from mio_ext import siglip_loss


class SiglipLoss(nn.Module):
    """Anchor i belongs to positive i and to no other text of the batch; columns after the second are all negatives.

    The trainer hands the loss's parameters to the optimizer, so scale and bias are learnt.
    """

    def __init__(self, model: SentenceTransformer, scale: float = 10.0, bias: float = -10.0) -> None:
        super().__init__()
        self.model = model
        self.log_scale = nn.Parameter(torch.tensor(scale).log())
        self.bias = nn.Parameter(torch.tensor(bias))

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor | None = None) -> Tensor:
        anchors, *texts = (self.model(features)["sentence_embedding"] for features in sentence_features)
        return siglip_loss(anchors, torch.cat(texts), self.log_scale.exp(), self.bias, normalize=True)

    def get_config_dict(self) -> dict[str, Any]:  # what the model card says
        return {"scale": self.log_scale.exp().item(), "bias": self.bias.item()}


def main() -> None:
    from datasets import Dataset
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments

    torch.manual_seed(0)
    words = [f"{kind}{i}" for kind in "ab" for i in range(32)]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["[UNK]", *words])}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    model = SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_dim=32)], device="cpu")
    pairs = {"anchor": words[:32], "positive": words[32:], "negative": [*words[33:], words[32]]}
    with tempfile.TemporaryDirectory() as folder:
        quiet = {"logging_strategy": "epoch", "save_strategy": "no", "report_to": [], "disable_tqdm": True}
        how = {"per_device_train_batch_size": 16, "num_train_epochs": 6, "learning_rate": 0.1, "use_cpu": True}
        args = SentenceTransformerTrainingArguments(folder, **how, **quiet)
        trainer = SentenceTransformerTrainer(model, args, Dataset.from_dict(pairs), loss=SiglipLoss(model))
        trainer.train()
    for entry in trainer.state.log_history[:-1]:
        print(f"epoch {entry['epoch']:.0f}: loss {float(entry['loss']):.3f}")


if __name__ == "__main__":
    main()
