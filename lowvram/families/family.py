"""What a family of models is: the contract that every other file in this folder fulfils.

A family knows which networks there are and how tensors pass through them. It knows no device, no
quantisation and no file. tests/test_family_contract.py checks every family against these points:

1. Importing a family imports neither torch nor diffusers.
2. Its components are data (`Component`).
3. `encode` sees a text encoder only, `predict` a transformer only, and decoding a VAE only.
4. Tensors go in and out by name, and those names stand in the artifacts.
5. Sizes, token counts and defaults are checked here, each with its source.
6. It brings a tiny configuration of itself, from the real classes.
"""

import importlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from torch import Tensor, nn

Config = Mapping[str, Any]  # a component's config.json
Blocks = str | tuple[str, ...]


@dataclass(frozen=True)
class Component:
    """One part of a model.

    Attributes:
        role: what it is for; also its name in the family's configurations.
        class_name: library and class, e.g. "diffusers.AutoencoderKL". A scheduler's own
            configuration may name another class.
        subfolder: where it lies in a repository in diffusers layout.
        dtype: in which it computes where the device allows; "" for parts without weights.
        blocks: path of the repeated blocks inside the module, which are all alike; or where they
            differ the paths of all of them (single modules, or lists of them), in order of use;
            "" where there are none.
        order: names of matrices that stand side by side in a block, in their order of use; where
            that is not the order in which the block lists them.
        overflows_in: the dtype, as on the command line, in which it gives wrong results; "" for
            none.
        needs: files of which one must be there, for parts without weights.
    """

    role: str
    class_name: str
    subfolder: str
    dtype: str = ""
    blocks: Blocks = ""
    order: tuple[str, ...] = ()
    overflows_in: str = ""
    needs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Published:
    """A model known by a short name.

    Attributes:
        repository: on the Hub; for a model inside this package, its folder there.
        revision: the commit that is fetched; "main" where none is pinned (the commit found is
            written into the artifacts, and later stages use that one).
        base: short name of the model that has the components missing here; "" for none.
        own: where there is a base, the roles of the components that lie here nevertheless.
        pickled: roles of the components whose weights are published as a pickle only, which is read
            by torch's restricted reader and kept as safetensors.
        bundled: whether it lies inside this package.
        steps, guidance_scale: defaults of this model; 0 where the family's apply. A guidance of 1
            is none.
        timesteps: that this model was distilled for, where they are not its scheduler's own.
        side: px of its own, square size, for lists that read no files; 0 where it is not known.
        sizes: width and height, px, of larger pictures that it was trained for all the same.
        words: module whose `understands(prompt)` says whether the model knows a word of a prompt,
            and whose `VOCABULARY` says which it knows; "" where it knows all.
    """

    repository: str
    revision: str = "main"
    base: str = ""
    own: tuple[str, ...] = ("transformer",)
    pickled: tuple[str, ...] = ()
    bundled: bool = False
    steps: int = 0
    guidance_scale: float = 0.0
    timesteps: tuple[int, ...] = ()
    side: int = 0
    sizes: tuple[tuple[int, int], ...] = ()
    words: str = ""


@dataclass(frozen=True)
class Size:
    """Width and height in px."""

    width: int
    height: int

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"


def guide(without: "Tensor", towards: "Tensor", guidance_scale: float) -> "Tensor":
    """Classifier-free guidance (arXiv 2207.12598): from the prediction for the negative text
    towards that for the prompt, and beyond.
    """
    return without + guidance_scale * (towards - without)


def scaling_factor(vae: Config) -> float:
    """Of latents, from a VAE's configuration, or diffusers' default."""
    return float(vae.get("scaling_factor", 0.18215))


class Family(ABC):
    """A family of models. Instances carry no state."""

    name: ClassVar[str]
    pipelines: ClassVar[tuple[str, ...]]  # `_class_name`s in model_index.json
    transformers: ClassVar[tuple[str, ...]]  # `_class_name`s of a lone transformer: see `claims`
    components: ClassVar[tuple[Component, ...]]
    models: ClassVar[Mapping[str, Published]]
    base: ClassVar[str]  # completes a repository that holds a transformer only
    default_steps: ClassVar[int]
    default_guidance_scale: ClassVar[float]
    max_tokens: ClassVar[int]
    text_tensors: ClassVar[tuple[str, ...]] = ("prompt_embeds", "prompt_attention_mask")
    # What its text encoder may be given, the default first: "none" for real tokens only, where
    # masks keep padding out; "max" for padding to the limit, as the diffusers pipeline does.
    paddings: ClassVar[tuple[str, ...]] = ("none", "max")
    cleans_captions: ClassVar[bool] = True  # whether its captions were cleaned in training
    needs_start: ClassVar[bool] = False  # whether it works on pictures that are there only
    default_strength: ClassVar[float] = 0.6  # how much of a start is made anew
    # Whether what is computed beyond the requested size is a margin on the right and below that
    # repeats the picture's edge and is cut off; else decode scales and crops.
    margins: ClassVar[bool] = False
    # What the pipeline may name besides, and only another family can run; see `Family.pipelines`.
    foreign: ClassVar[tuple[str, ...]] = ()
    # Listed in model_index.json besides the components.
    index: ClassVar[Mapping[str, Any]] = {}
    # How beautiful the picture and its opposite shall be, for models that are told; else empty.
    aesthetic_scores: ClassVar[tuple[float, ...]] = ()
    published_configs: ClassVar[Mapping[str, Config]]  # the true sizes, by role
    tiny_configs: ClassVar[Mapping[str, Config]]  # the same classes, small enough for a test

    def component(self, role: str) -> Component:
        """The component with that role."""
        return next(c for c in self.components if c.role == role)

    def claims(self, transformer: Config) -> bool:
        """Whether a transformer that came alone, with this configuration, is of this family."""
        return transformer.get("_class_name") in self.transformers

    @abstractmethod
    def mismatch(self, configs: Mapping[str, Config]) -> str:
        """Why components cannot work together; "" where they can.

        Args:
            configs: config.json of "text_encoder", "transformer" and "vae".
        """

    @abstractmethod
    def text_channels(self, transformer: Config) -> int:
        """Channels of the embeddings that a transformer takes."""

    @abstractmethod
    def clean(self, text: str, clean_caption: bool) -> str:
        """The text as the model saw its captions in training."""

    @abstractmethod
    def encode(
        self, text_encoder: "nn.Module", ids: "Tensor", mask: "Tensor"
    ) -> "dict[str, Tensor]":
        """Text to what the denoise stage is conditioned on.

        Args:
            ids: `[batch, tokens]`, token ids.
            mask: `[batch, tokens]`, 1 for a token, 0 for padding.

        Returns:
            tensors `text_tensors` with leading dimension `[batch]`: "prompt_embeds" `[batch,
            tokens, channels]`, "prompt_attention_mask" `[batch, tokens]` where padding is masked.
        """

    def picture_conditions(
        self, rendered: Size, aesthetic_scores: Sequence[float]
    ) -> "tuple[dict[str, Tensor], dict[str, Tensor]]":
        """What a picture is conditioned on besides its text.

        Args:
            rendered: size of the picture that is computed.
            aesthetic_scores: with the prompt, and with the negative prompt; empty where
                `Family.aesthetic_scores` is.

        Returns:
            tensors by name, beside those of the prompt, and beside those of the negative prompt.
        """
        return {}, {}

    @abstractmethod
    def conditions(
        self, positive: list[dict[str, "Tensor"]], negative: list[dict[str, "Tensor"]]
    ) -> dict[str, "Tensor"]:
        """What `predict` is conditioned on, for one batch of pictures.

        Args:
            positive: per picture, what the encode stage made of its prompt (as `encode` names it,
                without the leading dimension) and `picture_conditions` added.
            negative: the same of its negative prompt; empty without guidance.

        Returns:
            tensors by name with leading dimension `[branches x pictures]`, negative branch first.
        """

    @abstractmethod
    def predict(
        self,
        transformer: "nn.Module",
        latents: "Tensor",
        timestep: "Tensor",
        conditions: Mapping[str, "Tensor"],
        guidance_scale: float,
    ) -> "Tensor":
        """The model's prediction for one step, guidance applied.

        Args:
            latents: `[pictures, channels, height, width]`, scaled for the step.
            timestep: `[]` or `[1]`.
            conditions: as `conditions` made them.
            guidance_scale: 1 or less for none (then there is no negative branch).

        Returns:
            `[pictures, channels, height, width]`.
        """

    def stepped(self, outputs: "tuple[Tensor, ...]", steps: int) -> "Tensor":
        """The new latents among what a scheduler's step gave.

        Args:
            outputs: the previous sample; with some schedulers then the predicted original.
            steps: how many are taken in all.
        """
        return outputs[0]

    @abstractmethod
    def unscale(self, latents: "Tensor", vae: Config) -> "Tensor":
        """Latents as the transformer works on them, to latents as the VAE made them."""

    @abstractmethod
    def scale(self, latents: "Tensor", vae: Config) -> "Tensor":
        """Latents as the VAE made them, to latents as the transformer works on them."""

    @abstractmethod
    def size_like(self, configs: Mapping[str, Config], picture: Size, binning: bool) -> Size:
        """The model's own size with the aspect ratio of a picture: what is computed from it.

        Args:
            configs: as `render_size` takes them.
            picture: width and height in px, of any size.
            binning: one of the sizes that the model was trained on, where there is a table.
        """

    @abstractmethod
    def render_size(
        self, configs: Mapping[str, Config], size: Size | None, binning: bool
    ) -> tuple[Size, Size]:
        """What is asked for and what is computed for it.

        Args:
            configs: config.json of "transformer" and "vae".
            size: in px; None for the model's own.
            binning: compute at the nearest size that the model was trained on.

        Returns:
            the requested size (that of the picture) and the rendered one (that of the latents).

        Raises:
            RequestError: a size that the model cannot do.
        """

    def size_note(
        self, name: str, configs: Mapping[str, Config], requested: Size, rendered: Size
    ) -> str:
        """What a person should know before the model of that name computes that size; "" for
        nothing.
        """
        return ""

    def prompt_note(self, name: str, prompt: str) -> str:
        """The words that the model of that name knows, where the prompt has none; else ""."""
        published = self.models.get(name)
        if not (published and published.words):
            return ""
        words = importlib.import_module(published.words)
        return "" if words.understands(prompt) else str(words.VOCABULARY)

    @abstractmethod
    def latent_shape(self, configs: Mapping[str, Config], rendered: Size) -> tuple[int, int, int]:
        """Channels, height and width of the latents of one picture."""
