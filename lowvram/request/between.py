"""Where between two ends something lies: the options --towards and --at."""

from collections.abc import Sequence
from pathlib import Path

from lowvram.errors import RequestError
from lowvram.request.seeds import MAX_SEED

PLACES = (0.0, 0.25, 0.5, 0.75, 1.0)
MAX_PLACES = 1000


def check_places(at: Sequence[float] | None) -> tuple[float, ...]:
    """The places as asked; None for five, ends included.

    Raises:
        RequestError: none, too many, or one that is not between 0 and 1.
    """
    places = PLACES if at is None else tuple(float(each) for each in at)
    if not 0 < len(places) <= MAX_PLACES or not all(0 <= each <= 1 for each in places):
        shown = ", ".join(f"{each:g}" for each in places[:10])
        raise RequestError(f"--at {shown}: give 1 to {MAX_PLACES} numbers from 0 to 1")
    return places


def check_between(
    seed: int | Sequence[int],
    images: int | None,
    towards: int | None,
    at: Sequence[float] | None,
    latents: str | Path | None,
) -> tuple[float, ...]:
    """The places between two seeds, one for each picture of a prompt; none without a second seed.

    Raises:
        RequestError: what does not go with a second seed, or is nothing without one.
    """
    if towards is None:
        if at is not None:
            raise RequestError("--at is between two seeds: name the second one with --towards")
        return ()
    places = check_places(at)
    if isinstance(seed, Sequence):
        raise RequestError("--towards goes from one seed to another: give --seed one number")
    if images not in (None, len(places)):
        raise RequestError(
            f"--images {images} for {len(places)} places between two seeds: leave --images out"
        )
    if latents is not None:
        raise RequestError("--latents is the noise, and so are two seeds: give one of them")
    if not 0 <= towards <= MAX_SEED:
        raise RequestError(f"--towards {towards} is out of range: 0 to {MAX_SEED}")
    return places
