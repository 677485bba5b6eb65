"""The same prompts and seeds through several ways of working, each distinct stage once.

The first way is the reference. Another differs from it in one thing, and what that leaves equal is
not computed again: other ways to decode work on the reference's latents, and where an encoder gives
the reference's embeddings bit for bit, its latents and pictures are the reference's too.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Unpack

from lowvram import artifacts
from lowvram.compare.carrying import Carrier
from lowvram.compare.differences import (
    EmbedsDifference,
    Following,
    LatentsDifference,
    PictureDifference,
    PicturesDifference,
    TextDifference,
    follow,
)
from lowvram.compare.records import Done, Records
from lowvram.compare.variants import REFERENCE, Variant, Vary, variants
from lowvram.errors import LowvramError, RequestError, StorageError
from lowvram.memory.report_files import to_text
from lowvram.progress import OnProgress, Progress, ignore
from lowvram.repository import Model
from lowvram.request.run import RunOptions, resolve_run
from lowvram.request.tasks import Tasks
from lowvram.swaps import resolve_with

# Of a run's options: what compare has no place for.
_ONE_RUN = ("image", "sample_seed", "checkpoint_every", "preview", "refine")
DOCUMENT, SHEET, PAGE = "comparison.json", "sheet.png", "comparison.html"
_FILES = "files"
_JUDGED_MODEL = "demo"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Stage:
    """What one stage of a variant took.

    Attributes:
        of: the variant that carried it out, by its name: this one, or one whose result is the same.
        report: `StageReport.to_json()`, without what it was over time.
    """

    stage: str
    of: str
    report: dict[str, Any]


@dataclass(frozen=True)
class Compared:
    """One way of working, and how far it is from the reference.

    Attributes:
        failed: why it could not be carried out; "" where it was, and all else is there.
        embeds, latents, pictures: None for the reference, and where they are the reference's.
        following: None where nothing is judged.
        files: paths of "embeds", "latents" and "pictures".
    """

    variant: Variant
    failed: str = ""
    embeds: EmbedsDifference | None = None
    latents: LatentsDifference | None = None
    pictures: PicturesDifference | None = None
    following: Following | None = None
    stages: tuple[Stage, ...] = ()
    files: dict[str, Any] | None = None


@dataclass(frozen=True)
class Comparison:
    """What `compare` found.

    Attributes:
        model: its name.
        items: of each picture "prompt", "seed", "width" and "height".
        rows: the reference, then the others as they were named.
        settings: of the reference's stages, by stage: what changed a byte.
        document, sheet, page: the files that were written.
    """

    model: str
    items: list[dict[str, Any]]
    rows: list[Compared]
    settings: dict[str, dict[str, Any]]
    document: Path
    sheet: Path
    page: Path

    def to_json(self) -> dict[str, Any]:
        """The document that `--json` prints. An infinite number, as of equal pictures, is null."""
        document: dict[str, Any] = _finite(
            {
                "model": self.model,
                "pictures": self.items,
                "settings": self.settings,
                "variants": [_row(each) for each in self.rows],
                "sheet": str(self.sheet),
                "page": str(self.page),
            }
        )
        return document

    def table(self) -> str:
        """How far each is from the reference and what it took, for people."""
        from lowvram.compare.table import table

        return table(self)


def compare(
    prompts: str | Sequence[str],
    model: str,
    output: str | Path,
    *,
    vary: Vary,
    revision: str | None = None,
    transformer: str | Path | None = None,
    vae: str | Path | None = None,
    text_encoder: str | Path | None = None,
    in_process: bool = False,
    on_progress: OnProgress = ignore,
    **options: Unpack[RunOptions],
) -> Comparison:
    """Make the same pictures in several ways and measure how they differ.

    Args:
        output: a folder. What an interrupted comparison left there is used where it matches.
        vary: what differs: {"encoder_weights": ["whole", "8bit"], "decode": ["whole", "strips"]}.
            The first values are the reference's; each other value is a variant of it.
        transformer, vae, text_encoder: others than the model's: see `swaps.swap`.
        in_process: run all stages in this process.
        options: of a run, the same for all; see `request.run.RunOptions`.

    Raises:
        LowvramError: what was asked is wrong, the reference cannot be carried out, or a file
            cannot be written. Another variant that cannot be carried out is a row that says why.
    """
    ways = variants(vary, options)
    for name in _ONE_RUN:
        if options.get(name):
            other = ": lowvram encode-image makes one into what --start takes"
            raise RequestError(
                f"compare has no place for {name}{other if name == 'image' else ': leave it out'}"
            )
    with Carrier(in_process) as carrier:
        found = resolve_with(
            model, revision, transformer=transformer, vae=vae, text_encoder=text_encoder
        )
        records, rows = Records(), list[Compared]()
        items: list[dict[str, Any]] = []
        for way in ways:
            # What a way takes is measured: nothing comes from an earlier run's cache.
            asked: dict[str, Any] = {**options, **way.options, "cache": False}
            log.info("%s", way.title)
            try:
                tasks = resolve_run(prompts, found, _picture(Path(output), way), **asked)
                done = _carry_stages(way, tasks, carrier, records, on_progress)
                rows.append(_compared(way, done, found, rows, carrier))
                items = items or done["decode"].items
            except LowvramError as error:
                if way.name == REFERENCE or isinstance(error, StorageError):
                    raise
                log.warning("%s: %s", way.name, error)
                rows.append(Compared(way, failed=str(error)))
    return _finish(found, items, rows, Path(output))


def _carry_stages(
    way: Variant, tasks: Tasks, carrier: Carrier, records: Records, on_progress: OnProgress
) -> dict[str, Done]:
    """Each stage of a variant, by its name."""

    def told(progress: Progress) -> None:
        on_progress(replace(progress, doing=f"{way.name}: {progress.doing}"))

    carrier.check(tasks.denoise)
    done: dict[str, Done] = {}

    def do(stage: str, task: Any) -> str:
        done[stage] = records.carry(way.name, stage, task, lambda: carrier.stage(stage, task, told))
        return str(done[stage].paths[0])

    try:
        embeds = do("encode", tasks.encode)
        latents = do("denoise", replace(tasks.denoise, embeds=embeds))
        do("decode", replace(tasks.decode, latents=latents))
    except LowvramError as error:
        if way.name != REFERENCE:
            raise
        raise type(error)(f"{way.title} is what all else is compared with: {error}") from None
    return done


def _compared(
    way: Variant, done: dict[str, Done], model: Model, rows: Sequence[Compared], carrier: Carrier
) -> Compared:
    """A variant that was carried out, against the first of the rows."""
    files = {
        "embeds": str(done["encode"].paths[0]),
        "latents": str(done["denoise"].paths[0]),
        "pictures": [str(path) for path in done["decode"].paths],
    }
    found: dict[str, Any] = dict.fromkeys(("embeds", "latents", "pictures"))
    if rows:
        task = {"reference": rows[0].files, "variant": files, "model": model.record()}
        found |= {k: v for k, v in carrier.measure(task).items() if k in found}
    prompts = [item["prompt"] for item in done["decode"].items]
    return Compared(
        way,
        "",
        found["embeds"] and _embeds(found["embeds"]),
        found["latents"] and LatentsDifference(**found["latents"]),
        found["pictures"] and _pictures(found["pictures"]),
        follow(prompts, done["decode"].paths) if model.name == _JUDGED_MODEL else None,
        tuple(Stage(stage, each.variant, _short(each.report)) for stage, each in done.items()),
        files,
    )


def _finish(
    model: Model, items: list[dict[str, Any]], rows: list[Compared], folder: Path
) -> Comparison:
    """Draw the sheet, write the page and the document."""
    from lowvram.compare.page import page
    from lowvram.compare.sheet import draw

    result = Comparison(
        model=model.public_record()["name"],
        items=[
            {name: item[name] for name in ("prompt", "seed", "width", "height")} for item in items
        ],
        rows=rows,
        settings={each.stage: each.report["settings"] for each in rows[0].stages},
        document=folder / DOCUMENT,
        sheet=folder / SHEET,
        page=folder / PAGE,
    )
    sheet = draw(result)
    artifacts.write_bytes(result.sheet, sheet)
    artifacts.write_bytes(result.page, page(result, sheet).encode("utf-8", "replace"))
    artifacts.write_bytes(result.document, to_text(result.to_json()).encode())
    return result


def _picture(folder: Path, way: Variant) -> Path:
    return folder / _FILES / f"{way.slug}.png"


def _short(report: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in report.items() if name not in ("timeline", "marks")}


def _embeds(found: dict[str, Any]) -> EmbedsDifference:
    return EmbedsDifference(**{**found, "texts": [TextDifference(**t) for t in found["texts"]]})


def _pictures(found: dict[str, Any]) -> PicturesDifference:
    each = [PictureDifference(**picture) for picture in found["pictures"]]
    return PicturesDifference(**{**found, "pictures": each})


def _row(row: Compared) -> dict[str, Any]:
    fields = {name: value for name, value in asdict(row).items() if name != "variant"}
    return {"name": row.variant.name, "options": row.variant.options, **fields}


def _finite(value: Any) -> Any:
    """The same with null for what JSON has no number for."""
    if isinstance(value, dict):
        return {name: _finite(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
