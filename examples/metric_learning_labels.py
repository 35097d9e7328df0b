# SPDX-License-Identifier: Apache-2.0
"""pytorch-metric-learning: the sigmoid loss over all pairs of a labelled batch, as one of its losses."""

import torch
from pytorch_metric_learning.distances import CosineSimilarity
from pytorch_metric_learning.losses import BaseMetricLossFunction
from pytorch_metric_learning.samplers import MPerClassSampler
from pytorch_metric_learning.utils import common_functions
from torch import nn

from mio_ext import siglip_loss


class SigmoidPairLoss(BaseMetricLossFunction):
    """Pairs of one label are positive, all others negative, each judged on its own; scale and bias are learnt.

    Reference embeddings (ref_emb, ref_labels) may be another set, a memory of earlier batches say. Within one batch
    each row also meets itself, a positive of cosine 1: that adds a constant and moves no embedding.
    """

    def __init__(self, scale: float = 10.0, bias: float = -5.0, **kwargs) -> None:
        super().__init__(**kwargs)
        self.log_scale = nn.Parameter(torch.tensor(scale).log())
        self.bias = nn.Parameter(torch.tensor(bias))

    def compute_loss(self, embeddings, labels, indices_tuple, ref_emb, ref_labels):
        common_functions.labels_required(labels)
        common_functions.indices_tuple_not_supported(indices_tuple)  # no need of a miner: all pairs are cheap
        ids = {"image_ids": labels, "text_ids": ref_labels}
        loss = siglip_loss(embeddings, ref_emb, self.log_scale.exp(), self.bias, **ids, normalize=True)
        return {"loss": {"losses": loss, "indices": None, "reduction_type": "already_reduced"}}

    def get_default_distance(self) -> CosineSimilarity:
        return CosineSimilarity()


def main() -> None:
    torch.manual_seed(0)
    labels = torch.arange(16).repeat_interleave(16)
    x = torch.randn(16, 24)[labels] + 1.5 * torch.randn(len(labels), 24)  # classes that overlap
    sampler = MPerClassSampler(labels, m=4, batch_size=64, length_before_new_iter=256)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, labels), batch_size=64, sampler=sampler)
    model, criterion = nn.Sequential(nn.Linear(24, 64), nn.ReLU(), nn.Linear(64, 16)), SigmoidPairLoss()
    optimizer = torch.optim.AdamW([*model.parameters(), *criterion.parameters()], lr=1e-2)  # the loss learns too
    for epoch in range(6):
        for batch, batch_labels in loader:
            loss = criterion(model(batch), batch_labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        print(f"epoch {epoch}: loss {loss.item():.3f}")


if __name__ == "__main__":
    main()
