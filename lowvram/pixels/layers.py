"""Reads a diffusers AutoencoderKL as a sequence of passes, each from one map into another.

The order of the passes and their arithmetic are those of `Decoder.forward` and `Encoder.forward`
(diffusers/models/autoencoders/vae.py). What is not known here is refused by name: computing
something else than the VAE would is worse than not computing.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

from diffusers import AutoencoderKL
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.unets.unet_2d_blocks import (
    DownEncoderBlock2D,
    UNetMidBlock2D,
    UpDecoderBlock2D,
)
from diffusers.models.upsampling import Upsample2D
from torch import nn

from lowvram.errors import RequestError

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class Shape:
    """Of a feature map. It lies in memory in this order, so that a strip of rows is one block."""

    height: int
    channels: int
    width: int

    @property
    def size(self) -> int:
        """How many numbers."""
        return self.height * self.width * self.channels


@dataclass(frozen=True, eq=False)
class ConvPass:
    """Read a map once, write another once.

    Attributes:
        norm: applied with SiLU to what is read; None for neither.
        resample: "up" doubles what is read (nearest), "down" is a stride of 2 after zeros on the
            right and at the bottom.
        keeps: a residual branch begins: the map that is read is needed again.
        adds: a residual branch ends: the kept map is added, then all divided by `divisor`.
        shortcut: 1 x 1, applied to the kept map before.
        measured: the next pass normalises what is written.
    """

    conv: nn.Conv2d
    source: Shape
    norm: nn.GroupNorm | None = None
    resample: Literal["same", "up", "down"] = "same"
    keeps: bool = False
    adds: bool = False
    shortcut: nn.Conv2d | None = None
    divisor: float = 1.0
    measured: bool = False

    @property
    def target(self) -> Shape:
        """Of the map that is written."""
        height, width = self.source.height, self.source.width
        if self.resample == "up":
            height, width = 2 * height, 2 * width
        elif self.resample == "down":
            height, width = height // 2, width // 2
        return Shape(height, self.conv.out_channels, width)

    @property
    def halo(self) -> int:
        """Rows that a row needs above and below itself."""
        return self.conv.kernel_size[0] // 2

    @property
    def work(self) -> int:
        """Multiplications."""
        taps = self.conv.kernel_size[0] ** 2 * self.conv.in_channels
        if self.shortcut is not None:
            taps += self.shortcut.in_channels
        return self.target.size * taps


@dataclass(frozen=True, eq=False)
class AttentionPass:
    """Every position looks at every other; the map is changed in place."""

    attention: Attention
    source: Shape
    measured: bool = False

    @property
    def norm(self) -> nn.GroupNorm:
        """Applied to what is read."""
        return self.attention.group_norm

    @property
    def target(self) -> Shape:
        """As the source."""
        return self.source

    @property
    def tokens(self) -> int:
        """Positions."""
        return self.source.height * self.source.width

    @property
    def work(self) -> int:
        """Multiplications."""
        return self.source.size * (4 * self.source.channels + 2 * self.tokens)


Pass = ConvPass | AttentionPass


def decoder_passes(vae: Any, height: int, width: int) -> list[Pass]:
    """What decoding latents of that size consists of.

    Raises:
        RequestError: the VAE holds something that strips do not know.
    """
    _check_vae(vae)
    decoder = vae.decoder
    passes = _Passes(Shape(height, vae.config.latent_channels, width))
    if vae.post_quant_conv is not None:
        passes.conv(vae.post_quant_conv)
    passes.conv(decoder.conv_in)
    _mid_block(passes, decoder.mid_block)
    for block in decoder.up_blocks:
        _known(block, UpDecoderBlock2D)
        for resnet in block.resnets:
            _resnet(passes, resnet)
        for upsampler in block.upsamplers or ():
            _upsampler(passes, upsampler)
    _known(decoder.conv_act, nn.SiLU)
    passes.conv(decoder.conv_out, norm=_known(decoder.conv_norm_out, nn.GroupNorm))
    return passes.finished()


def encoder_passes(vae: Any, height: int, width: int) -> list[Pass]:
    """What encoding a picture of that size (px) consists of.

    Raises:
        RequestError: the VAE holds something that strips do not know, or nothing would be left of
            the picture.
    """
    _check_vae(vae)
    encoder = vae.encoder
    passes = _Passes(Shape(height, vae.config.in_channels, width))
    passes.conv(encoder.conv_in)
    for block in encoder.down_blocks:
        _known(block, DownEncoderBlock2D)
        for resnet in block.resnets:
            _resnet(passes, resnet)
        for downsampler in block.downsamplers or ():
            _downsampler(passes, downsampler)
    if not passes.shape.size:
        raise RequestError(f"a picture of {width} x {height} px is too small to encode: enlarge it")
    _mid_block(passes, encoder.mid_block)
    _known(encoder.conv_act, nn.SiLU)
    passes.conv(encoder.conv_out, norm=_known(encoder.conv_norm_out, nn.GroupNorm))
    if vae.quant_conv is not None:
        passes.conv(vae.quant_conv)
    return passes.finished()


class _Passes:
    """Collects passes, each reading what the one before writes."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        self._passes: list[Pass] = []

    def add(self, added: Pass) -> None:
        self._passes.append(added)
        self.shape = added.target

    def conv(self, conv: Any, **more: Any) -> None:
        """A convolution of the current map, checked to be of the known kind."""
        kernel, down = conv.kernel_size, more.get("resample") == "down"
        _require(type(conv) is nn.Conv2d, conv, "")
        _require(kernel in ((1, 1), (3, 3)), conv, f"of kernel {kernel}")
        _require(conv.stride == ((2, 2) if down else (1, 1)), conv, f"of stride {conv.stride}")
        padding = 0 if down else kernel[0] // 2
        _require(conv.padding == (padding, padding), conv, f"with padding {conv.padding}")
        plain = conv.dilation == (1, 1) and conv.groups == 1 and conv.padding_mode == "zeros"
        _require(plain, conv, "with dilation, groups or another padding")
        self.add(ConvPass(conv, self.shape, **more))

    def finished(self) -> list[Pass]:
        """The passes, each told whether the next one normalises."""
        following: Iterator[Pass | None] = iter([*self._passes[1:], None])
        return [
            replace(one, measured=after is not None and after.norm is not None)
            for one, after in zip(self._passes, following, strict=True)
        ]


def _mid_block(passes: _Passes, block: Any) -> None:
    _known(block, UNetMidBlock2D)
    _resnet(passes, block.resnets[0])
    for attention, resnet in zip(block.attentions, block.resnets[1:], strict=True):
        if attention is not None:
            _attention(passes, attention)
        _resnet(passes, resnet)


def _resnet(passes: _Passes, resnet: Any) -> None:
    _known(resnet, ResnetBlock2D)
    _known(resnet.nonlinearity, nn.SiLU)
    _require(resnet.time_emb_proj is None, resnet, "with a time embedding")
    _require(resnet.upsample is None and resnet.downsample is None, resnet, "that resamples")
    _require(resnet.dropout.p == 0 or not resnet.training, resnet, "with dropout, in training")
    shortcut = resnet.conv_shortcut
    if shortcut is not None:
        _require(shortcut.kernel_size == (1, 1), shortcut, "as a shortcut, not 1 x 1")
        _known(shortcut, nn.Conv2d)
    passes.conv(resnet.conv1, norm=_known(resnet.norm1, nn.GroupNorm), keeps=True)
    passes.conv(
        resnet.conv2,
        norm=_known(resnet.norm2, nn.GroupNorm),
        adds=True,
        shortcut=shortcut,
        divisor=float(resnet.output_scale_factor),
    )


def _attention(passes: _Passes, attention: Any) -> None:
    _known(attention, Attention)
    processor = type(attention.processor)
    known = processor in (AttnProcessor, AttnProcessor2_0) and not attention.fused_projections
    _require(known, attention, f"with {processor.__name__}")
    _known(attention.group_norm, nn.GroupNorm)
    norms = (attention.spatial_norm, attention.norm_q, attention.norm_k, attention.norm_cross)
    _require(norms == (None,) * 4, attention, "with another norm than GroupNorm")
    plain = attention.residual_connection and attention.scale_qk and attention.heads == 1
    _require(plain, attention, "of several heads, or without residual or scale")
    for linear in (attention.to_q, attention.to_k, attention.to_v, attention.to_out[0]):
        _known(linear, nn.Linear)
    passes.add(AttentionPass(attention, passes.shape))


def _upsampler(passes: _Passes, upsampler: Any) -> None:
    _known(upsampler, Upsample2D)
    plain = upsampler.use_conv and upsampler.interpolate and upsampler.norm is None
    _require(plain and not upsampler.use_conv_transpose, upsampler, "other than nearest with conv")
    passes.conv(upsampler.conv, resample="up")


def _downsampler(passes: _Passes, downsampler: Any) -> None:
    _known(downsampler, Downsample2D)
    plain = downsampler.use_conv and downsampler.padding == 0 and downsampler.norm is None
    _require(plain, downsampler, "other than a conv with zeros right and below")
    passes.conv(downsampler.conv, resample="down")


def _check_vae(vae: Any) -> None:
    _require(isinstance(vae, AutoencoderKL), vae, "as a VAE")
    _require(not vae.use_tiling, vae, "with tiling on")


def _known(module: Any, kind: type[M]) -> M:
    _require(type(module) is kind, module, f"in place of {kind.__name__}")
    return module


def _require(holds: bool, module: Any, how: str) -> None:
    if not holds:
        name = type(module).__name__
        what = f"{name} {how}".strip()
        raise RequestError(f"strips do not know {what} in this VAE: use --decode whole")
