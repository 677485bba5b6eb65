"""Out of memory at each of the first allocations of every stage; and many stages in one process."""

import gc
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file
from test_plan import pixels

from lowvram import errors
from lowvram.course import Trip, carry_stage
from lowvram.memory.count import LiveBytes
from lowvram.progress import ignore
from lowvram.repository import resolve
from lowvram.request.run import resolve_run
from lowvram.request.tasks import to_json
from lowvram.stages.dispatch import carry_out

FAULTS = 50
PROMPT = "a red circle"


class Fault(LiveBytes):
    """Refuses the n-th allocation, counted from 0, once."""

    def __init__(self, number: int) -> None:
        super().__init__("cpu")
        self.number, self.count = number, 0

    def changed(self, key: int, size: int) -> None:
        if size > 0:
            self.count += 1
            if self.count == self.number + 1:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")


@pytest.fixture(scope="module")
def trip(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Trip:
    """The three stages of a run whose files are there, so that each can be done alone."""
    picture = tmp_path_factory.mktemp("faults") / "x.png"
    made = resolve_run(
        [PROMPT], resolve(str(tiny)), picture, steps=2, size=(64, 64), binning=False, dtype="fp32"
    )
    trip = Trip(made)
    for stage in trip.tasks.by_stage():
        carry_stage(stage, [trip], carry_out, ignore)
    assert len(trip.made) == 3
    return trip


@pytest.mark.parametrize("stage", ["encode", "denoise", "decode"])
def test_a_refused_allocation(stage: str, trip: Trip, monkeypatch: pytest.MonkeyPatch) -> None:
    """It recovers with the same result, or exits with the code; no artifact is lost."""
    output, inputs = (
        Path(trip.tasks.by_stage()[stage].output),
        [Path(t.output) for t in trip.tasks.by_stage().values()],
    )
    before = {path: path.read_bytes() for path in inputs}
    expected = _result(output)
    recovered = 0
    for number in range(FAULTS):
        with Fault(number) as fault:
            try:
                again = Trip(trip.tasks)
                carry_stage(stage, [again], carry_out, ignore)
                assert again.error is None and list(again.made) == [stage]
                recovered += 1
            except errors.MemoryExhaustedError as error:
                assert error.exit_code == 6
        if fault.count <= number:
            break  # the stage has no more allocations than that
        found = _result(output)
        assert all(_near(found[name], expected[name]) for name in expected), number
        output.write_bytes(before[output])
        assert {path: path.read_bytes() for path in inputs} == before
        assert set(output.parent.iterdir()) == set(inputs)
    assert recovered > FAULTS / 2 or fault.count <= number


def _result(path: Path) -> dict[str, torch.Tensor]:
    return {"pixels": pixels(path)} if path.suffix == ".png" else load_file(path)


def _near(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Strips and chunks round otherwise: a level of a pixel, the last bits of latents."""
    if found.dtype == torch.int16:
        return bool((found - expected).abs().max() <= 1)
    return torch.allclose(found.float(), expected.float(), rtol=1e-4, atol=1e-4)


def repeat(cycles: int, work: Callable[[], object]) -> None:
    """A call repeated so often must leave the process as large as it was after the first ten."""
    sizes = []
    for _ in range(cycles):
        work()
        gc.collect()
        sizes.append(psutil.Process().memory_info().rss)
    print([size - sizes[0] for size in sizes])
    assert min(sizes[-5:]) - min(sizes[10 : cycles // 2]) <= 1 << 20


@pytest.mark.parametrize(
    ("stage", "way"),
    [
        ("encode", {"weights": "stream"}),
        ("denoise", {"weights": "stream"}),
        ("decode", {"decode": "strips"}),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value.values())),
)
def test_fifty_cycles_leave_nothing(stage: str, way: dict[str, str], trip: Trip) -> None:
    task = {**to_json(trip.tasks.by_stage()[stage]), **way}
    told: list[bool] = []

    def cycle() -> None:
        carry_out(stage, [task], ignore, lambda _, outcome: told.append("error" in outcome))

    def tensors() -> int:
        return sum(issubclass(type(each), torch.Tensor) for each in gc.get_objects())

    cycle()
    before = tensors()
    repeat(50, cycle)
    assert tensors() <= before
    assert told == 51 * [False]
