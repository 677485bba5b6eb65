"""What a stage says while it works: a callback's argument, JSON types only."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """One step forward.

    Attributes:
        stage: "encode", "encode-image", "denoise", "decode" or "prepare".
        doing: what is under way, for people: "loading the text encoder".
        done, total: in steps, texts, blocks, hundredths of pictures or MB; total 0 where it is
            not known.
        per: how many of these are one of what a person counts: of hundredths of pictures 100.
    """

    stage: str
    doing: str
    done: int = 0
    total: int = 0
    per: int = 1

    def counted(self) -> str:
        """For people: "2/20"; "" where the total is not known."""
        return f"{self.done // self.per}/{self.total // self.per}" if self.total else ""


OnProgress = Callable[[Progress], None]


def ignore(progress: Progress) -> None:
    """No one is looking."""


def within(
    on_progress: OnProgress, stage: str, doing: str, before: int, batch: int, pictures: int
) -> Callable[[int, int], None]:
    """Progress inside of a batch, in hundredths of a picture; whole pictures are told elsewhere.

    Args:
        before: pictures that are done.
        batch, pictures: how many there are in the batch, and in all.
    """

    def on_work(done: int, total: int) -> None:
        if done < total:
            hundredths = 100 * before + 100 * batch * done // total
            on_progress(Progress(stage, doing, hundredths, 100 * pictures, per=100))

    return on_work
