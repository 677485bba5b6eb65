"""What a picture starts from instead of noise: latents that are there already."""

from dataclasses import dataclass
from pathlib import Path

from lowvram import artifacts
from lowvram.contents import file_sha256, weight_bytes, weight_paths
from lowvram.errors import ArtifactError, RequestError
from lowvram.families.family import Size, scaling_factor
from lowvram.repository import Model


@dataclass(frozen=True)
class SavedLatents:
    """A file of latents to start from.

    Attributes:
        requested, rendered: sizes as in its header.
        pictures: how many it holds.
    """

    path: str
    requested: Size
    rendered: Size
    pictures: int


def read_start(path: str | Path, model: Model) -> SavedLatents:
    """What a file that encode-image or denoise wrote says of itself; its tensors are not read.

    Raises:
        ArtifactError: not such a file.
        RequestError: another VAE than the model's made it.
    """
    header = artifacts.read_header(Path(path), "latents")
    made_by = Model.from_record(header.model)
    if not _same_vae(made_by, model):
        raise RequestError(_of_another_vae(path, made_by, model))
    try:
        requested, rendered = (Size(*header.settings[name]) for name in ("requested", "rendered"))
        pictures = int(header.tensors["latents"]["shape"][0])
    except (KeyError, TypeError, ValueError, IndexError):
        raise ArtifactError(f"{path} does not say its size: make it again") from None
    return SavedLatents(str(path), requested, rendered, pictures)


def check_rendered(start: SavedLatents, rendered: Size, asked: Size) -> None:
    """Refuse latents of another size than is computed.

    Raises:
        RequestError: names both, and the way out.
    """
    if rendered != start.rendered:
        raise RequestError(
            f"{start.path} holds pictures of {start.rendered} px, but {rendered} px are computed "
            f"for --size {asked}: leave --size out, or encode the picture again with --size {asked}"
        )


def check_pictures(start: SavedLatents, picture: int | None, pictures: int) -> int:
    """Which picture of the file all start from; -1 where each has its own.

    Args:
        picture: as asked; None for the only one, or each its own.
        pictures: how many are to be made.

    Raises:
        RequestError: there is none, or their numbers differ.
    """
    if picture is not None:
        if not 0 <= picture < start.pictures:
            raise RequestError(
                f"--start-picture {picture}: {start.path} holds {start.pictures}, "
                f"use 0 to {start.pictures - 1}"
            )
        return picture
    if start.pictures not in (1, pictures):
        raise RequestError(
            f"{start.path} holds {start.pictures} pictures and {pictures} are to be made: "
            f"use --start-picture 0 for one of them, or --images {start.pictures}"
        )
    return 0 if start.pictures == 1 else -1


def check_strength(strength: float, steps: int) -> float:
    """How much of the way is done again.

    Args:
        steps: of the whole way.

    Raises:
        RequestError: out of range, or so small that no step would be done.
    """
    if not 0 < strength <= 1:  # NaN fails this too
        raise RequestError(f"--strength {strength} is out of range: more than 0, up to 1")
    if steps_done(steps, strength) < 1:
        needed = next((n for n in range(steps, 1001) if steps_done(n, strength)), 0)
        more = f"use --steps {needed}, or " if needed else "use "
        least = -(-1000 // steps) / 1000
        raise RequestError(
            f"--strength {strength:g} of {steps} steps is less than one step: "
            f"{more}--strength {least:g}"
        )
    return float(strength)


def steps_done(steps: int, strength: float) -> int:
    """Of so many steps, those that a strength asks for, rounded down.

    As `get_timesteps` of diffusers' img2img pipelines, but for products that floating point puts
    just below a whole number: 0.29 of 100 steps are 29, and 28 there.
    """
    return min(int(steps * strength + 1e-9), steps)


def _same_vae(one: Model, other: Model) -> bool:
    """By source, else by content where both are here."""
    sources = one.sources.get("vae"), other.sources.get("vae")
    if None in sources:
        return False
    if sources[0] == sources[1]:
        return True
    scales = [scaling_factor(each.config("vae")) for each in (one, other)]
    sizes = [weight_bytes(each, "vae") for each in (one, other)]
    if scales[0] != scales[1] or sizes[0] is None or sizes[0] != sizes[1]:
        return False
    ours, theirs = (
        [file_sha256(path) for path in weight_paths(each, "vae")] for each in (one, other)
    )
    return ours == theirs


def _of_another_vae(path: str | Path, made_by: Model, model: Model) -> str:
    again = f"encode the picture with lowvram encode-image -m {model.name}"
    if "vae" not in {*made_by.swapped, *model.swapped}:
        return (
            f"{path} was made with the VAE of {made_by.name}, which is not that of {model.name}: "
            f"decode it, and {again}"
        )
    own, wanted = (
        each.sources["vae"].place if "vae" in each.swapped else each.name
        for each in (made_by, model)
    )
    vae = f" --vae {wanted}" if "vae" in model.swapped else ""
    return (
        f"{path} was made with the VAE of {own}, which is not that of {wanted}: "
        f"give --vae {own}, or {again}{vae}"
    )
