"""Which seed each picture has."""

from collections.abc import Sequence
from operator import index

from lowvram.errors import RequestError
from lowvram.request.checks import in_range

MAX_SEED = 2**63 - 1
MAX_IMAGES = 10_000  # of one prompt


def seeds_of_pictures(
    seed: int | Sequence[int], images: int | None, prompts: int
) -> tuple[tuple[int, ...], int]:
    """One seed per picture, prompt by prompt; and the pictures per prompt.

    Args:
        seed: of the first picture of each prompt, the next ones count up; or one per picture of a
            prompt; or one per picture in all, prompt by prompt.
        images: per prompt; None for one, or as many as there are seeds.

    Raises:
        RequestError: seeds do not go with the number of pictures, or are out of range.
    """
    if isinstance(seed, Sequence):
        images = in_range("--images", len(seed) if images is None else images, 1, MAX_IMAGES)
        seeds = tuple(index(each) for each in seed) * (prompts if len(seed) == images else 1)
    else:
        images = in_range("--images", 1 if images is None else images, 1, MAX_IMAGES)
        seeds = tuple(range(index(seed), index(seed) + images)) * prompts
    if len(seeds) != images * prompts:
        raise RequestError(
            f"{len(seeds)} seeds for {images * prompts} pictures "
            f"({prompts} prompts, {images} each): "
            "give one seed, as many as --images, or one for each picture"
        )
    if not all(0 <= each <= MAX_SEED for each in seeds):
        raise RequestError(f"seeds must be between 0 and {MAX_SEED}: {seed}")
    return seeds, images
