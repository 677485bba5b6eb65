"""Decode and encode in strips of rows: the pixels of the whole decode, in any room.

Feature maps stay on the host (`feature_maps.py`), and a strip of one is on the device at a time.
The VAE is read as passes from map to map (`layers.py`), which are run one after the other
(`passes.py`, `attention.py`); the heights of the strips follow from the room (`room.py`). Imports
torch when called.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from lowvram.errors import RequestError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from lowvram.pixels.feature_maps import Place, Store
    from lowvram.pixels.layers import Pass
    from lowvram.pixels.strategy import OnWork

Direction = Literal["decode", "encode"]


@dataclass(frozen=True)
class StripDecode:
    """Exact, in a room of a given size.

    Attributes:
        room_bytes: what may be held on the device beside the VAE's weights.
        maps: where feature maps live meanwhile.
    """

    room_bytes: int
    maps: "Place"

    name: ClassVar[str] = "strips"

    def settings(self) -> dict[str, Any]:
        """See `Pixels.settings`: the room changes no pixel."""
        return {"strategy": self.name}

    def decode(
        self, vae: Any, latents: "Tensor", device: "torch.device", on_progress: "OnWork"
    ) -> "Tensor":
        """As `Pixels.decode`, picture by picture.

        Raises:
            RequestError: the room is too small, or the VAE holds something unknown.
            StorageError: maps are on disk, and it is full or cannot be written.
        """
        from lowvram.pixels.layers import decoder_passes

        return self._run(decoder_passes(vae, *latents.shape[-2:]), latents, device, on_progress)

    def encode(
        self, vae: Any, pixels: "Tensor", device: "torch.device", on_progress: "OnWork"
    ) -> "Tensor":
        """As `Pixels.encode`, picture by picture; raises what `decode` does."""
        from lowvram.pixels.layers import encoder_passes

        return self._run(encoder_passes(vae, *pixels.shape[-2:]), pixels, device, on_progress)

    def _run(
        self,
        passes: "Sequence[Pass]",
        pictures: "Tensor",
        device: "torch.device",
        on_progress: "OnWork",
    ) -> "Tensor":
        import torch

        from lowvram.pixels.passes import run_passes
        from lowvram.pixels.room import Costs, least
        from lowvram.pixels.transfers import transfers_for

        needed = least(passes, Costs(pictures.element_size(), device.type))
        if needed > self.room_bytes:
            raise RequestError(
                f"strips of this size need {needed / 1e6:.1f} MB on the device beside the weights, "
                f"and have {self.room_bytes / 1e6:.1f} MB: use a larger budget or a smaller size"
            )
        done, total = 0, sum(one.work for one in passes) * len(pictures)

        def advance(work: int) -> None:
            nonlocal done
            done += work
            on_progress(done, total)

        last = passes[-1].target
        shape = (len(pictures), last.channels, last.height, last.width)
        result = torch.empty(shape, dtype=pictures.dtype)
        for picture, whole in zip(pictures, result, strict=True):
            # Copies end before the store closes: it frees what they read and write.
            with torch.no_grad(), self.maps.open() as store, transfers_for(device) as transfers:
                # No name here keeps the first map, which goes as soon as it is read: when encoding,
                # that is the picture.
                run = run_passes(
                    passes,
                    _first_map(store, picture),
                    self.room_bytes,
                    store,
                    transfers,
                    advance,
                )
                whole.copy_(run.transpose(0, 1))
                del run  # or it would lie beside the next picture's maps
        return result


def _first_map(store: "Store", picture: "Tensor") -> "Tensor":
    """The picture `[channels, height, width]` as a map: rows first."""
    channels, height, width = picture.shape
    source = store.empty((height, channels, width), picture.dtype)
    source.copy_(picture.transpose(0, 1))
    return source


def least_room(
    vae: Any,
    height: int,
    width: int,
    dtype: "torch.dtype",
    device_type: str,
    direction: Direction = "decode",
) -> int:
    """Bytes on the device beside the weights without which strips cannot work.

    Args:
        vae: an AutoencoderKL, of which only shapes are looked at: it may be on the meta device.
        height, width: of the picture, px.

    Raises:
        RequestError: the VAE holds something that strips do not know.
    """
    from lowvram.pixels import room

    return room.least(
        _passes(vae, height, width, direction), room.Costs(dtype.itemsize, device_type)
    )


def comfortable_room(
    vae: Any,
    height: int,
    width: int,
    dtype: "torch.dtype",
    device_type: str,
    direction: Direction = "decode",
) -> int:
    """Bytes beyond which strips gain little; arguments and errors as those of `least_room`."""
    from lowvram.pixels import room

    passes = _passes(vae, height, width, direction)
    return room.comfortable(passes, room.Costs(dtype.itemsize, device_type))


def used_room(
    vae: Any,
    height: int,
    width: int,
    dtype: "torch.dtype",
    device_type: str,
    room_bytes: int,
    direction: Direction = "decode",
) -> int:
    """What strips take of a room; other arguments and errors as those of `least_room`."""
    from lowvram.pixels import room

    passes = _passes(vae, height, width, direction)
    return room.used(passes, room_bytes, room.Costs(dtype.itemsize, device_type))


def maps_bytes(
    vae: Any, height: int, width: int, dtype: "torch.dtype", direction: Direction = "decode"
) -> int:
    """Bytes of the feature maps that live at once on the host, at most."""
    from lowvram.pixels import room

    return room.maps_bytes(_passes(vae, height, width, direction), dtype.itemsize)


def _passes(vae: Any, height: int, width: int, direction: Direction) -> "list[Pass]":
    from lowvram.pixels import layers

    if direction == "encode":
        return layers.encoder_passes(vae, height, width)
    scale = 2 ** (len(vae.config.block_out_channels) - 1)
    return layers.decoder_passes(vae, height // scale, width // scale)
