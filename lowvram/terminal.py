"""What a person sees on stderr while stages run: one line a stage, and a bar on long work."""

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from lowvram.progress import OnProgress, Progress

if TYPE_CHECKING:
    from rich.console import Console


def quiet_environment() -> None:
    """The part of `quiet_libraries` that needs no library, for this process and its children."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    # A warning for each product in 8 bits, and one for every import on CPUs with AVX512-BF16.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    if not _is_watched():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def quiet_libraries() -> None:
    """Keep the libraries' own progress bars and advice off the terminal.

    Only for processes of our own: a program that imports lowvram sets its logging itself.
    """
    quiet_environment()
    warnings.filterwarnings(
        "ignore", module=r"(torch|torchsde|transformers|diffusers|bitsandbytes)\b"
    )
    from huggingface_hub.utils.tqdm import enable_progress_bars
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()  # this turns off those of downloads, too
    if _is_watched():
        enable_progress_bars()


def _is_watched() -> bool:
    """Whether stderr is a terminal. A service may have none at all."""
    return sys.stderr is not None and sys.stderr.isatty()


@contextmanager
def terminal() -> Iterator[OnProgress]:
    """Show log lines, and progress where stderr is a terminal."""
    from rich.console import Console

    console = Console(stderr=True, soft_wrap=True)
    # A run goes on when no one reads its lines any more.
    console.on_broken_pipe = lambda: None  # type: ignore[method-assign]
    logger = logging.getLogger("lowvram")
    handler = _Lines(console)
    level = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    try:
        with _bars(console) as on_progress:
            yield on_progress
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


class _Lines(logging.Handler):
    """Log records as plain lines that do not disturb a bar."""

    def __init__(self, console: "Console") -> None:
        super().__init__(logging.INFO)
        self.console = console

    def emit(self, record: logging.LogRecord) -> None:
        prefix = "" if record.levelno <= logging.INFO else f"{record.levelname.lower()}: "
        with suppress(OSError):
            self.console.print(prefix + record.getMessage(), markup=False, highlight=False)


@contextmanager
def _bars(console: "Console") -> Iterator[OnProgress]:
    """One bar for what is under way, with the time left where it can be known."""
    if not _is_watched():
        yield lambda progress: None
        return
    from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    with Bars(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[counted]}"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    ) as bars:
        current = bars.add_task("starting", total=None, counted="")
        doing = ""

        def show(progress: Progress) -> None:
            nonlocal current, doing
            if progress.doing != doing:
                doing = progress.doing
                bars.remove_task(current)
                current = bars.add_task(doing, total=progress.total or None, counted="")
            bars.update(
                current,
                completed=progress.done,
                total=progress.total or None,
                counted=progress.counted(),
            )

        yield show
