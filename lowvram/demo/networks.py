"""The demo model's five components: the classes of the published PixArt-Sigma, small.

Every matrix of the text encoder has sides that are multiples of 64, so that 8-bit and 4-bit
quantisation by blocks of 64 really applies to it.
"""

import copy
import json
import math
import random
import re
import shutil
from collections import Counter
from io import BytesIO
from pathlib import Path

import sentencepiece
import torch
from diffusers import (
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
)
from diffusers.models.attention_processor import Attention
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from sentencepiece import sentencepiece_model_pb2
from transformers import T5Config, T5EncoderModel, T5Tokenizer

from .captions import FILLERS, caption, decorated, fragment
from .scenes import CANVASES, random_scene

SCALING_FACTOR = 0.13025  # the published VAE's; the demo's latents are whitened to suit it
LATENT_CHANNELS, LATENT_SIDE = 4, CANVASES[0][0] // 8

_TEXT_WIDTH = 128
_ONE_BEFORE, _ONE_AFTER = 1, 17  # T5's buckets of relative position -1 and +1 (32 buckets)
_WORDS = """the of and to in is it that was for as with his he be by at have are this not had her
from or an one all were they she we when your can there use each which do how their if will up
other about out many then them these so some would make like him into time has look two more write
go see number no way could people my than first water been call who its now find long down day did
get come made may part cat dog house tree car boat sun moon sky sea flower bird fish man woman child
photo painting picture image drawing art light dark night morning forest mountain river city street
beautiful cute old new round flat bright simple please draw show shape colour color pink brown grey
gray without near above below under next behind front between beside hello world"""


def make_tokenizer(folder: Path) -> T5Tokenizer:
    """Train a SentencePiece unigram model on captions and write it as `folder/spiece.model`.

    The pieces that training finds suit rare words; a whole word that captions use is added with
    the logarithm of its frequency as score, because training on so few words prunes them ("on"
    became "o" + "n"). Ids of the special pieces are T5's.
    """
    rng = random.Random(0)
    captions = []
    for _ in range(20_000):
        scene = random_scene(rng)
        captions += [caption(scene, rng), fragment(scene, rng)]
    captions += [decorated(text, rng) for text in captions[:2000]]
    ascii_characters = "".join(map(chr, range(33, 127)))
    trained = BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(captions + _WORDS.split() * 20 + [" ".join(ascii_characters)]),
        model_writer=trained,
        vocab_size=400,
        model_type="unigram",
        hard_vocab_limit=False,
        required_chars=ascii_characters,
        character_coverage=1.0,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        pad_piece="<pad>",
        eos_piece="</s>",
        unk_piece="<unk>",
        minloglevel=2,
    )
    model = sentencepiece_model_pb2.ModelProto.FromString(trained.getvalue())
    said = (re.sub("[,.!]", " ", text).split() for text in captions[:-2000])
    uses = Counter(word for words in said for word in words)
    uses[","] = sum(text.count(",") for text in captions[:-2000])
    uses.update(dict.fromkeys(" ".join(FILLERS).split(), 20))
    uses.update(dict.fromkeys(_WORDS.split(), 1))
    known = {piece.piece: piece for piece in model.pieces}
    for word, count in sorted(uses.items()):
        name = word if word == "," else f"\u2581{word}"
        score = math.log(count / uses.total())
        if name in known:
            known[name].score = score
        else:
            model.pieces.add(piece=name, score=score)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "spiece.model").write_bytes(model.SerializeToString())
    return T5Tokenizer.from_pretrained(str(folder))


def make_text_encoder(tokenizer: T5Tokenizer) -> T5EncoderModel:
    """T5 v1.1's encoder: 3 layers of width 128, gated GELU.

    Two heads start out looking at the token before and two at the token after. From T5's own start
    the encoder named shapes, places and sizes within 250 steps, yet after 600 steps still guessed
    which of two colours was the background.
    """
    config = T5Config(
        vocab_size=64 * math.ceil(len(tokenizer) / 64),
        d_model=_TEXT_WIDTH,
        d_kv=32,
        num_heads=4,
        d_ff=384,
        num_layers=3,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        pad_token_id=0,
        eos_token_id=1,
        is_encoder_decoder=False,
        use_cache=False,
    )
    encoder = T5EncoderModel(config)
    bias = encoder.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight
    with torch.no_grad():
        bias[_ONE_BEFORE, :2] += 4.0
        bias[_ONE_AFTER, 2:] += 4.0
    return encoder


def make_vae() -> AutoencoderKL:
    """A KL autoencoder with 8 x 8 px to a latent pixel and 4 latent channels.

    Groups of the normalisation are large (two to a layer): with pairs of channels to a group flat
    colours were slow to learn, because each group forgets its mean and its contrast.
    """
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 16, 32, 64),
        layers_per_block=1,
        norm_num_groups=2,
        latent_channels=LATENT_CHANNELS,
        sample_size=8 * LATENT_SIDE,
        scaling_factor=SCALING_FACTOR,
        force_upcast=False,
    )
    _start_as_thumbnail(vae)
    return vae


@torch.no_grad()
def _start_as_thumbnail(vae: AutoencoderKL) -> None:
    """Set the first weights so that latents are an 8 times smaller picture and decode to blocks.

    Learning then begins with the edges, not with finding out what a colour is. Eight channels of
    every layer carry red, green, blue and a constant, each with its negative, since
    silu(x) - silu(-x) = x. Residual branches start at zero. The constant is there to dominate the
    contrast that group normalisation divides by.
    """
    for module in vae.modules():
        if isinstance(module, ResnetBlock2D):
            module.conv2.weight.zero_()
            module.conv2.bias.zero_()
            if module.conv_shortcut is not None:
                _carry(module.conv_shortcut, [(0, 0, 1.0)])
        elif isinstance(module, Attention):
            module.to_out[0].weight.zero_()
            module.to_out[0].bias.zero_()
        elif isinstance(module, Downsample2D):
            _carry(module.conv, [(0, 0, 0.25), (0, 1, 0.25), (1, 0, 0.25), (1, 1, 0.25)])
        elif isinstance(module, Upsample2D):
            _carry(module.conv, [(1, 1, 1.0)])
    for half in (vae.encoder, vae.decoder):
        half.conv_in.weight[:8] = 0.0
        half.conv_in.bias[:8] = torch.tensor([0.0] * 6 + [2.0, -2.0])
        group = half.conv_norm_out.num_channels // half.conv_norm_out.num_groups
        contrast = math.sqrt((2 * 2.0**2 + 6 * 0.35) / group)  # 0.35: mean square of a colour
        half.conv_out.weight[:3] = 0.0
        half.conv_out.bias[:3] = 0.0
        for colour in range(3):
            for channel, sign in ((2 * colour, 1.0), (2 * colour + 1, -1.0)):
                half.conv_in.weight[channel, colour, 1, 1] = sign
                half.conv_out.weight[colour, channel, 1, 1] = sign * contrast
    vae.encoder.conv_out.weight[LATENT_CHANNELS:] *= 0.1
    vae.encoder.conv_out.bias[LATENT_CHANNELS:] = -5.0  # log variance: noise of std 0.08
    for conv in (vae.quant_conv, vae.post_quant_conv):
        torch.nn.init.dirac_(conv.weight)
        torch.nn.init.zeros_(conv.bias)


def _carry(conv: torch.nn.Conv2d, taps: list[tuple[int, int, float]]) -> None:
    """Make the first eight channels pass through `conv`, weighted by (row, column, weight) taps."""
    carried = torch.arange(8)
    assert conv.bias is not None
    conv.weight[:8] = 0.0
    conv.bias[:8] = 0.0
    for row, column, weight in taps:
        conv.weight[carried, carried, row, column] = weight


def make_transformer() -> PixArtTransformer2DModel:
    """Five layers of width 256 over 2 x 2 patches: 64 tokens to a square picture.

    As in the published model half of the output channels are a variance that sampling ignores.
    """
    transformer = PixArtTransformer2DModel(
        num_attention_heads=8,
        attention_head_dim=32,
        cross_attention_dim=256,
        num_layers=5,
        in_channels=LATENT_CHANNELS,
        out_channels=2 * LATENT_CHANNELS,
        caption_channels=_TEXT_WIDTH,
        sample_size=LATENT_SIDE,
        patch_size=2,
        interpolation_scale=1,
        use_additional_conditions=False,
    )
    torch.nn.init.zeros_(transformer.proj_out.weight)
    torch.nn.init.zeros_(transformer.proj_out.bias)
    return transformer


def make_scheduler() -> DPMSolverMultistepScheduler:
    """Second-order DPM-Solver++ for v-prediction.

    Zero terminal SNR, because with a trace of the picture left in the last noise the model learns
    to read the background's mean from it, which sampling from pure noise cannot provide.
    """
    return DPMSolverMultistepScheduler(
        beta_start=1e-4,
        beta_end=0.02,
        beta_schedule="linear",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        rescale_betas_zero_snr=True,
    )


def export(
    folder: Path,
    tokenizer_folder: Path,
    text_encoder: T5EncoderModel,
    transformer: PixArtTransformer2DModel,
    vae: AutoencoderKL,
) -> None:
    """Write the pipeline in diffusers' layout, weights in fp16, replacing `folder`.

    The tokenizer ships as `spiece.model` alone, as the published model's does.
    """
    tokenizer = T5Tokenizer.from_pretrained(str(tokenizer_folder))
    draft = folder.with_name(f"{folder.name}.draft")
    shutil.rmtree(draft, ignore_errors=True)
    pipeline = PixArtSigmaPipeline(
        tokenizer=tokenizer,
        text_encoder=_half(text_encoder),
        transformer=_half(transformer),
        vae=_half(vae),
        scheduler=make_scheduler(),
    )
    pipeline.save_pretrained(str(draft), safe_serialization=True)
    for path in draft.glob("*/config.json"):  # where one was trained on from is no part of it
        config = json.loads(path.read_text())
        config.pop("_name_or_path", None)
        path.write_text(json.dumps(config, indent=2) + "\n")
    shutil.rmtree(draft / "tokenizer")
    (draft / "tokenizer").mkdir()
    shutil.copy(tokenizer_folder / "spiece.model", draft / "tokenizer" / "spiece.model")
    shutil.rmtree(folder, ignore_errors=True)
    draft.rename(folder)


def imported(
    folder: Path, device: torch.device
) -> tuple[T5EncoderModel, PixArtTransformer2DModel, AutoencoderKL]:
    """The networks of an exported pipeline, in fp32, to be trained on."""
    encoder = T5EncoderModel.from_pretrained(folder / "text_encoder", dtype=torch.float32)
    transformer = PixArtTransformer2DModel.from_pretrained(folder / "transformer")
    vae = AutoencoderKL.from_pretrained(folder / "vae")
    networks = (encoder, transformer, vae)
    encoder, transformer, vae = (each.float().to(device).train() for each in networks)
    return encoder, transformer, vae


def _half(network: torch.nn.Module) -> torch.nn.Module:
    """An fp16 copy."""
    return copy.deepcopy(network).half()
