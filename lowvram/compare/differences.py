"""How far a variant's files are from the reference's: typed numbers, JSON types only.

`measure` reads the files and is carried out in a stage's process, since embeddings in bfloat16
need torch.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowvram import artifacts

if TYPE_CHECKING:
    import numpy as np

Files = Mapping[str, Any]  # "embeds" and "latents": a path; "pictures": paths


@dataclass(frozen=True)
class TextDifference:
    """Of one text, prompt or negative prompt: a number for each of its tokens, in order."""

    text: str
    tokens: list[str]
    cosines: list[float]
    errors: list[float]


@dataclass(frozen=True)
class EmbedsDifference:
    """Of all tokens of all different texts.

    Attributes:
        equal: bit for bit.
        cosine, cosine_worst: mean and smallest.
        error, error_worst: relative, mean and largest.
        worst_token, worst_text: the token with the largest error, and the text that it stands in.
        texts: every token's numbers.
    """

    equal: bool
    cosine: float
    cosine_worst: float
    error: float
    error_worst: float
    worst_token: str
    worst_text: str
    texts: list[TextDifference] = field(default_factory=list)


@dataclass(frozen=True)
class LatentsDifference:
    """Relative error of each picture's latents, the mean and the largest of them."""

    equal: bool
    error: float
    error_worst: float
    errors: list[float]


@dataclass(frozen=True)
class PictureDifference:
    """Of one picture: see `metrics`; infinite `psnr` for an equal one, `flip` None without it."""

    psnr: float
    ssim: float
    flip: float | None
    largest: int  # difference of a channel, in levels of 255


@dataclass(frozen=True)
class PicturesDifference:
    """Of all pictures.

    Attributes:
        psnr: of the mean squared error of all, in dB; infinite where all are equal.
        psnr_worst: of the picture that differs most.
        ssim, flip: means; `ssim_worst` the smallest, `flip_worst` the largest.
        largest: difference of a channel of a pixel, in levels of 255.
        differing: how many pictures are not equal.
    """

    equal: bool
    psnr: float
    psnr_worst: float
    ssim: float
    ssim_worst: float
    flip: float | None
    flip_worst: float | None
    largest: int
    differing: int
    pictures: list[PictureDifference]


@dataclass(frozen=True)
class Following:
    """How much of what the prompts ask for a judge finds in the pictures (demo model only).

    Attributes:
        asked, found: attributes in all judged pictures: background, number, shapes, colours, sizes,
            place, relation.
        by_attribute: the same two numbers for each.
        judged: pictures whose prompt is in the demo's words, of `pictures`.
    """

    asked: int
    found: int
    by_attribute: dict[str, list[int]]
    judged: int
    pictures: int


def measure(task: Mapping[str, Any]) -> dict[str, Any]:
    """Compare the files of a variant with those of the reference.

    Args:
        task: "reference" and "variant" as `Files`, and "model", its record.

    Returns:
        the fields of `EmbedsDifference`, `LatentsDifference` and `PicturesDifference` under
        "embeds", "latents" and "pictures"; None where both name the same files.
    """
    before, after = task["reference"], task["variant"]
    found: dict[str, Any] = dict.fromkeys(("embeds", "latents", "pictures"))
    if before["embeds"] != after["embeds"]:
        found["embeds"] = asdict(_embeds(before, after, task["model"]))
    if before["latents"] != after["latents"]:
        found["latents"] = asdict(_latents(before, after))
    if before["pictures"] != after["pictures"]:
        found["pictures"] = asdict(compare_pictures(before["pictures"], after["pictures"]))
    return found


def compare_texts(texts: Sequence[TextDifference]) -> EmbedsDifference:
    """The numbers of all texts from those of their tokens."""
    each = [
        (error, cosine, token, one.text)
        for one in texts
        for error, cosine, token in zip(one.errors, one.cosines, one.tokens, strict=True)
    ]
    error, _, token, text = max(each)
    return EmbedsDifference(
        equal=error == 0,
        cosine=sum(cosine for _, cosine, _, _ in each) / len(each),
        cosine_worst=min(cosine for _, cosine, _, _ in each),
        error=sum(error for error, _, _, _ in each) / len(each),
        error_worst=error,
        worst_token=token,
        worst_text=text,
        texts=list(texts),
    )


def compare_pictures(before: Sequence[str], after: Sequence[str]) -> PicturesDifference:
    """The numbers of all pictures, read from their files, which are of one size."""
    import numpy as np

    from lowvram.compare.metrics import mean_squared_error, psnr, ssim
    from lowvram.compare.perceptual import flip

    pictures, squares = [], []
    for first, second in zip(before, after, strict=True):
        a, b = read_levels(first), read_levels(second)
        squares.append(mean_squared_error(a, b))
        largest = int(np.abs(a.astype(int) - b).max())
        pictures.append(PictureDifference(psnr(squares[-1]), ssim(a, b), flip(a, b), largest))
    flips = [each.flip for each in pictures if each.flip is not None]
    return PicturesDifference(
        equal=not any(squares),
        psnr=psnr(sum(squares) / len(squares)),
        psnr_worst=psnr(max(squares)),
        ssim=sum(each.ssim for each in pictures) / len(pictures),
        ssim_worst=min(each.ssim for each in pictures),
        flip=sum(flips) / len(flips) if flips else None,
        flip_worst=max(flips, default=None),
        largest=max(each.largest for each in pictures),
        differing=sum(each.largest > 0 for each in pictures),
        pictures=pictures,
    )


def follow(prompts: Sequence[str], pictures: Sequence[Path]) -> Following | None:
    """Judge the demo model's pictures; None where there is nothing to judge.

    Args:
        prompts: of each picture.
        pictures: of a size in `CANVASES`, or nothing is judged: the judge knows no other.
    """
    from PIL import Image

    from lowvram.demo.detector import look, verdict
    from lowvram.demo.reading import ATTRIBUTES, asked
    from lowvram.demo.scenes import CANVASES

    counts = {name: [0, 0] for name in ATTRIBUTES}
    judged = 0
    for prompt, path in zip(prompts, pictures, strict=True):
        wanted = asked(prompt)
        with Image.open(path) as picture:
            if wanted is None or picture.size not in CANVASES:
                continue
            right = verdict(look(picture), wanted)
        judged += 1
        for name in counts.keys() & right.keys():
            counts[name][0] += 1
            counts[name][1] += right[name]
    if not judged:
        return None
    asked_for, found = (sum(column) for column in zip(*counts.values(), strict=True))
    return Following(asked_for, found, counts, judged, len(pictures))


def read_levels(path: str | Path) -> "np.ndarray":
    """A picture's levels, `[height, width, 3]`, uint8."""
    import numpy as np
    from PIL import Image

    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"))


def _embeds(before: Files, after: Files, model: Mapping[str, Any]) -> EmbedsDifference:
    from lowvram.compare.metrics import cosines, relative_errors

    header, reference = artifacts.read(Path(before["embeds"]), "embeds")
    _, other = artifacts.read(Path(after["embeds"]), "embeds")
    names = _token_namer(model)
    texts = []
    for text, prefix in _texts(header.items):
        mask = reference.get(f"{prefix}prompt_attention_mask")  # absent where nothing is masked
        real = slice(None) if mask is None else mask.bool()
        a, b = (
            each[f"{prefix}prompt_embeds"][real].double().numpy() for each in (reference, other)
        )
        texts.append(
            TextDifference(
                text, names(text, len(a)), cosines(a, b).tolist(), relative_errors(a, b).tolist()
            )
        )
    return compare_texts(texts)


def _texts(items: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, str]]:
    """Each different text once, with the beginning of its tensors' names."""
    seen: set[str] = set()
    for index, item in enumerate(items):
        for prefix, kind in ((f"{index}.", "text"), (f"{index}.negative_", "negative_text")):
            if item[kind] not in seen:
                seen.add(item[kind])
                yield item[kind], prefix


def _latents(before: Files, after: Files) -> LatentsDifference:
    from lowvram.compare.metrics import relative_errors

    a, b = (
        artifacts.read(Path(each["latents"]), "latents")[1]["latents"].double().numpy()
        for each in (before, after)
    )
    errors = relative_errors(a, b).tolist()
    return LatentsDifference(not any(errors), sum(errors) / len(errors), max(errors), errors)


def _token_namer(model: Mapping[str, Any]) -> Any:
    """Text and number of tokens to what each token says."""
    from lowvram.repository import Model
    from lowvram.stages.encode import load_tokenizer

    tokenizer = load_tokenizer(Model.from_record(model))

    def names(text: str, count: int) -> list[str]:
        pieces = tokenizer.convert_ids_to_tokens(tokenizer(text).input_ids)
        if len(pieces) > count:  # cut, and the end of the text put last
            pieces = [*pieces[: count - 1], pieces[-1]]
        said = [str(piece).replace("\N{LOWER ONE EIGHTH BLOCK}", "") for piece in pieces]
        said += [f"token {index}" for index in range(len(said), count)]
        shown = {tokenizer.eos_token: "end of text", "": "space"}
        return [shown.get(each, each) for each in said]

    return names
