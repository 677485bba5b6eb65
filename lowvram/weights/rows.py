"""An embedding table that stays in its file: 8 KB a token are read of T5-XXL's 263 MB."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from lowvram.weights.shards import Shards


class EmbeddingRows(nn.Module):
    """An embedding whose table stays in its file: only the rows asked for are read."""

    def __init__(self, shards: Shards, name: str, dtype: torch.dtype) -> None:
        super().__init__()
        self._shards, self._name, self._dtype = shards, name, dtype
        self._weight = torch.zeros(1, dtype=dtype).expand(shards.tensors[name].shape)

    @property
    def weight(self) -> Tensor:
        """Shape and dtype of the table, for forwards that look at them: one number, repeated."""
        return self._weight

    def forward(self, ids: Tensor) -> Tensor:
        """Ids `[…]` to rows `[…, columns]`, on the device of the ids."""
        wanted, places = ids.unique(return_inverse=True)
        count = self._shards.tensors[self._name].shape[0]
        if wanted.numel() and not 0 <= int(wanted[0]) <= int(wanted[-1]) < count:
            raise IndexError(f"token {int(wanted[-1])} is beyond the {count} rows of {self._name}")
        rows = self._shards.rows(self._name, wanted.tolist(), self._dtype)
        return functional.embedding(places, rows.to(ids.device))
