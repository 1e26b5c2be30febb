"""SimCLR: two views of a place are to be recognised among the views of other places.

Chen et al. 2020, arXiv:2002.05709. In 3D a view is a crop: both views of a place share a part of
each side, and differ by what augmentation does to them. Two forms, by name:

- `nt_xent`, as nnssl does it (Wald et al. 2024, arXiv:2412.17041): two places of each volume, views
  that share half of each side or more, temperature 0.5. The views of all other places of the batch
  of all ranks are negatives, the volume's own second place too.
- `within_scan`, as CT-FM does it (Pai et al. 2025, arXiv:2501.09001): 15 places of each volume,
  temperature 0.1; the first view of a place looks for the second among the places of the same
  volume only, so no two scans are told apart by their scanner. Views there are resized crops of a
  third of the place or more; here their size changes where augmentation zooms. Places may overlap,
  and are false negatives then, there as here.

The embedding of `nt_xent` is an MLP of the means of all maps of a pyramid, as there, with batch
norms in it, as in Chen's own code (nnssl normalises each embedding by itself): at its temperature
the loss stays where it begins, at ln(negatives + 1), as long as embeddings have most in common,
and means of maps behind instance norms do. That of `within_scan` is an MLP of the mean of the
deepest map; norms over the scans of a batch would tell scans apart, which it is not asked. Padding
and hidden voxels are seen as they are; there is no loss on voxels that could leave them out. Behind
instance norms a mean has something to say only where a map has more than a few cells: of two cells,
each channel has the same values in every crop.

Shape legend: S samples, P places of each, E width of the embedding.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor

from pretrain.backbones.backbone import Backbone
from pretrain.contrast import nt_xent, within_scan
from pretrain.crops import Pairs
from pretrain.objective import Batch, Losses, Objective
from pretrain.projection import Pool, Projector, by_sample


class SimCLR(Objective):
    """Two views of each place, and a contrastive loss on their embeddings.

    Args:
        encoder: any backbone.
        form: whose negatives; see above.
        places: of each sample; `within_scan` needs two.
        overlap: least share of each side that the views of a place have in common.
        temperature: of the similarities.
        hidden_dim: width of the head's middle.
        out_dim: width of the embedding.

    Raises:
        ValueError: `within_scan` with a single place, which has no negative.
    """

    encoder: Backbone

    def __init__(
        self,
        *,
        encoder: Backbone,
        form: Literal["nt_xent", "within_scan"] = "nt_xent",
        places: Annotated[int, Field(ge=1, le=256)] = 2,
        overlap: Annotated[float, Field(gt=0, le=1)] = 0.5,
        temperature: Annotated[float, Field(gt=0, le=10)] = 0.5,
        hidden_dim: Annotated[int, Field(ge=1, le=16384)] = 512,
        out_dim: Annotated[int, Field(ge=2, le=4096)] = 128,
    ) -> None:
        super().__init__()
        if form == "within_scan" and places < 2:
            raise ValueError(
                "form=within_scan with places=1: the other places of a scan are its negatives; "
                "give places=2 or more"
            )
        self.encoder = encoder
        self.crops = Pairs(count=places, overlap=overlap)
        self.form = form
        self.temperature = temperature
        self.compares = joint = form == "nt_xent"
        self.pool = Pool(encoder, every=joint)
        self.projector = Projector(
            self.pool.width, hidden_dim, out_dim, norm=joint, last_norm=joint
        )

    def forward(self, batch: Batch, progress: float) -> Losses:
        """The mean loss of a view that looks for the other one."""
        first, second = self.views(batch)
        if self.form == "nt_xent":
            loss = nt_xent(first.flatten(0, 1), second.flatten(0, 1), self.temperature)
        else:
            loss = within_scan(first, second, self.temperature)
        return Losses(loss, {self.form: loss.detach()})

    def views(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Embeddings of both views of each place, [S, P, E] each."""
        embedded: Tensor = self.projector(self.pool(self.encoder(batch.image)))
        pairs = by_sample(by_sample(embedded, 2), self.crops.count)  # [S, P, 2, E]
        first, second = pairs.unbind(2)
        return first, second
