"""A section for each result file: what it shows, the command, the figures, and what on."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.page import cpu, cuda, following, gpu_tables, micro, networks
from benchmarks.page.tables import measured_of, measured_on

Document = Mapping[str, Any]


@dataclass(frozen=True)
class Section:
    """One result file.

    Attributes:
        name: of the file, without its ending.
        shows: one sentence.
        command: that makes it again.
        body: the figures as Markdown.
    """

    name: str
    title: str
    shows: str
    command: str
    body: Callable[[Document], str]

    def text(self, document: Document) -> str:
        """The section as Markdown."""
        rows = document.get("rows")
        by_row = isinstance(rows, dict) and any("recorded" in row for row in rows.values())
        about = measured_of(rows.values()) if by_row and rows else measured_on(document)
        about = "" if "machines" in document else about  # the body says of which rows each is
        return (
            f"## {self.title}\n\n{self.shows} Figures: "
            f"[{self.name}.json](results/{self.name}.json).\n\n```sh\n{self.command}\n```\n\n{about}\n{self.body(document)}"
        )


def _python(path: str) -> str:
    return f"nice .venv/bin/python benchmarks/{path}"


SECTIONS = (
    Section(
        "gpu",
        "On a GPU: contenders side by side",
        "What people use today against `lowvram`, true sizes, each in a process of its own.",
        "benchmarks/gpu.sh",
        gpu_tables.body,
    ),
    Section(
        "cuda",
        "On a GPU: what its tests measured",
        "Foretold bytes against held ones, strips under their budget, copies beside computation.",
        "LOWVRAM_CUDA_REPORT=report.jsonl scripts/test tests/test_cuda.py "
        "tests/test_cuda_memory.py\n.venv/bin/python benchmarks/cuda.py report.jsonl",
        cuda.body,
    ),
    Section(
        "foretold",
        "On a GPU: the least that each stage needs, foretold",
        "The smallest budget for tensors that the planner accepts, nothing quantised: the true "
        "sizes with guidance, by the same rules as in a run. No card was needed.",
        _python("foretold.py"),
        networks.foretold,
    ),
    Section(
        "cpu",
        "On a CPU: contenders side by side",
        "The demo model end to end with every contender, and the true sizes with random weights.",
        "benchmarks/cpu.sh",
        cpu.body,
    ),
    Section(
        "streaming",
        "T5-XXL streamed from disk",
        "Streaming the true-size text encoder against reading the same bytes and against computing "
        "with weights that are there.",
        _python("streaming.py .checkpoints/pixart-sigma-512-published-bfloat16"),
        networks.streaming,
    ),
    Section(
        "strips",
        "VAE decode in strips",
        "Strips against the whole decode in time, pixels, and bytes held on a device.",
        _python("strips.py"),
        networks.strips,
    ),
    Section(
        "prediction",
        "Foretold and measured peaks",
        "The peak that a plan says against that of torch's CPU allocator, weights included.",
        _python("prediction.py"),
        networks.prediction,
    ),
    Section(
        "savings",
        "Exact savings of a denoising step",
        "Activations of PixArt XL/2 in float16 with each saving, counted without weights or GPU.",
        _python("savings.py"),
        networks.savings,
    ),
    Section(
        "compare_demo",
        "The demo model in several ways",
        "How far quantised, streamed, tiled and other-dtype runs are from the reference.",
        "OMP_NUM_THREADS=1 " + _python("compare_demo.py"),
        networks.compare_demo,
    ),
    Section(
        "prompt_following",
        "What the demo model understands",
        "The share of pictures of prompts it never saw in which a detector finds what was asked.",
        _python("prompt_following.py --jobs 2"),
        following.prompt_following,
    ),
    Section(
        "sizes",
        "Sizes that come back as asked",
        "For how many sizes from 256 to 4096 px a side the final resize is wrong, by arithmetic.",
        _python("sizes.py"),
        networks.sizes,
    ),
    Section(
        "micro_reader",
        "Micro: reading weights",
        "Bandwidth of the product's reader beside `dd` on the same file.",
        _python("micro/reader.py"),
        micro.reader,
    ),
    Section(
        "micro_artifacts",
        "Micro: files between the stages",
        "Bandwidth of writing (synced), verifying and reading them at their true sizes.",
        _python("micro/artifacts.py"),
        micro.artifacts,
    ),
    Section(
        "micro_startup",
        "Micro: starting",
        "Seconds before anything happens, whole processes, medians.",
        _python("micro/startup.py"),
        micro.startup,
    ),
    Section(
        "micro_meter",
        "Micro: the meter's sampling",
        "By how much the work beside it takes longer, at the interval of a stage.",
        _python("micro/meter.py --repeats 60"),
        micro.meter,
    ),
)
