"""How a planned row is measured: which command, under which conditions, and whether it agrees."""

import json
import math
import re
import shlex
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.baselines.contenders import text_encoder
from benchmarks.side_by_side import inputs
from benchmarks.side_by_side.agreement import Agreement, Kind
from benchmarks.side_by_side.caches import (
    STAGES,
    cache_of,
    environment,
    measure_rates,
    not_prepared,
    runs_lowvram,
    weights_read,
)
from benchmarks.side_by_side.places import place
from benchmarks.side_by_side.processes import (
    Ended,
    json_of,
    lines_of,
    make_cold,
    make_warm,
    python,
)
from benchmarks.side_by_side.rows import Plan
from lowvram.errors import first_line

IN_ONE_PROCESS = ("streaming", "throttled")  # parts whose rows share one, to import once
_CACHES = ("cache-plain", "cache-prepared")
_TIMES = ("seconds", "load_seconds", "compute_seconds", "seconds_to_first_picture",
          "seconds_per_further_picture", "seconds_per_step", "step_seconds",
          "first_step_seconds")  # fmt: skip


@dataclass
class Runner:
    """Measures rows.

    Attributes:
        folder: with the checkpoints; outputs and caches go there too.
        device: "cuda" or "cpu".
        sides: px for which there is a checkpoint; other sizes are decoded with the base's.
        base: side of the checkpoint whose files were written.
        timeout: seconds that a row may take.
        ends: when all has to end, in monotonic seconds: a row under way is stopped then.
        card: what names it in lowvram's caches; empty where there is nothing to measure.
    """

    folder: Path
    device: str
    sides: Sequence[int]
    base: int
    timeout: float
    ends: float = math.inf
    card: Sequence[str] = ()
    _equal: dict[tuple[str, int, int], tuple[str, str]] = field(default_factory=dict)
    _making: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self._agreement = Agreement(self.folder / "outputs", self.device)

    def is_over(self) -> bool:
        """Whether there is no time left."""
        return time.monotonic() >= self.ends

    def get_ready(self, plans: Sequence[Plan]) -> bool:
        """Have the card measured for lowvram before its rows, as its users do; whether it is."""
        if not self.card:
            return True
        known = [self.folder / name for name in _CACHES]
        caches = dict.fromkeys(cache_of(self.folder, p) for p in plans if runs_lowvram(p))
        return all([measure_rates(cache, known, self.card, self._left()) for cache in caches])

    def measure(self, plan: Plan) -> dict[str, Any]:
        """A row in a process of its own; what goes wrong here is one too."""
        try:
            return self._measure(plan)
        except Exception as error:  # a row, and not the end of all that come after it
            return _cannot(f"{type(error).__name__}: {first_line(error)}")

    def _measure(self, plan: Plan) -> dict[str, Any]:
        model, cache = self._model(plan), cache_of(self.folder, plan)
        folders = weights_read(plan, model, cache)
        if "prepared" in plan.also and not any(folders[0].rglob("*.safetensors")):
            return _cannot("was not prepared: the row that prepares comes first")
        if plan.cache == "cold":
            make_cold(folders)
        elif plan.cache == "warm":
            make_warm(folders)
        words = shlex.split(plan.contender)
        if words[0] == "prepare":
            return self._prepare(plan, model)
        if words[0] == "interpreter":
            return self._interpreter(plan)
        if words[0] in STAGES:
            return self._stage(plan, model, words)
        return self._contender(plan, model)

    def measure_together(self, plans: Sequence[Plan]) -> Iterator[tuple[Plan, dict[str, Any]]]:
        """Rows of one process, each as soon as it is there."""
        work = self._work("steps")
        tasks = "".join(json.dumps(self._task(plan, work)) + "\n" for plan in plans)
        by_key = {plan.key: plan for plan in plans}
        command, error = python("benchmarks.side_by_side.steps"), "no answer"
        variables = environment(cache_of(self.folder, plans[0]))
        try:
            for line in lines_of(command, self._left(len(plans)), variables, tasks):
                if isinstance(line, Ended):
                    error = line.error or error
                    break
                found = json.loads(line)
                plan = by_key.pop(found.pop("key"))
                yield plan, self._judged_equal(plan, found)
        except Exception as problem:  # rows, and not the end of all that come after them
            error = f"{type(problem).__name__}: {first_line(problem)}"
        for plan in by_key.values():  # what it did not come to
            yield plan, _cannot(error)

    def _contender(self, plan: Plan, model: Path) -> dict[str, Any]:
        output = self._work(plan.key)
        words = [plan.contender, "--model", str(model), "--prompts", str(plan.prompts)]
        words += ["--size", str(plan.size), "--device", self.device, "--output", str(output)]
        words += ["--steps", str(plan.steps)] if plan.steps else ["--latents", self._noise(plan)]
        words += [] if plan.limit is None else ["--limit", str(plan.limit)]
        words += [] if plan.budget is None else ["--budget", str(plan.budget)]
        words += [] if plan.stage_budget is None else ["--stage-budget", str(plan.stage_budget)]
        if self.device == "cpu":
            words += ["--dtype", "fp32"]  # no CPU computes half precision fast
        started = time.monotonic()
        command = python("benchmarks.baselines", *words)
        row, ended = self._json_of(command, plan)
        wall = time.monotonic() - started
        if row is None:
            return _cannot(ended) | {"wall_seconds": wall}
        row |= {"wall_seconds": wall}
        if row["ok"] and "prepared" in plan.also and (stages := not_prepared(row)):
            row |= _cannot(f"was not prepared: {stages}")
        if row["ok"]:
            precision = text_encoder(plan.contender, row["dtype"])
            kind = Kind(plan.size, plan.steps, precision, plan.contender)
            blended = plan.contender.endswith("-tiling")
            row |= self._agreement.judge(row["outputs"], kind, blended)
        row.pop("outputs", None)
        return believed(plan, row)

    def _stage(self, plan: Plan, model: Path, words: list[str]) -> dict[str, Any]:
        """One stage of lowvram by a way that is named, as its own command."""
        work = self._work(plan.key)
        out = work / {"encode": "x.embeds.safetensors", "denoise": "x.latents.safetensors",
                      "decode": "x.png"}[words[0]]  # fmt: skip
        given = {"encode": ["a red fox in the morning fog", "-m", str(model), "--no-cache"]}
        given["denoise"] = ["{embeds}", "--steps", str(plan.steps), "--no-binning"]
        given["denoise"] += ["--size", f"{plan.size}x{plan.size}"]
        given["decode"] = ["{latents}"]
        filled = [self._filled(word, plan, model) for word in given[words[0]]]
        command = python("lowvram", words[0], *filled, *words[1:], "-o", str(out))
        command += ["--device", self.device, "--json"]
        document, ended = self._json_of(command, plan)
        if document is None:
            return {"ok": False, "error": _said(str(ended), words[0])}
        stage = document["stages"][0]
        for name in ("timeline", "marks", "left_tensors", "settings"):
            stage.pop(name, None)
        return believed(plan, {"ok": True, "error": None, "stages": [{"name": words[0], **stage}]})

    def _prepare(self, plan: Plan, model: Path) -> dict[str, Any]:
        started = time.monotonic()
        command = python("lowvram", "prepare", str(model), "--json")
        document, ended = self._json_of(command, plan)
        if document is None:
            return _cannot(ended)
        size = sum(each["bytes"] for each in document["prepared"])
        return {
            "ok": True,
            "error": None,
            "wall_seconds": time.monotonic() - started,
            "bytes": size,
        }

    def _interpreter(self, plan: Plan) -> dict[str, Any]:
        command = python("benchmarks.side_by_side.interpreter", "--device", self.device)
        row, ended = self._json_of(command, plan)
        return believed(plan, row or _cannot(ended))

    def _task(self, plan: Plan, work: Path) -> dict[str, Any]:
        words = shlex.split(plan.contender)
        numbers = dict(re.findall(r"(bus|disk|block) (\S+)", " ".join(plan.also)))
        return {
            "key": plan.key,
            "stage": words[0],
            "weights": words[words.index("--weights") + 1],
            "model": str(self._model(plan)),
            "size": plan.size,
            "steps": plan.steps,
            "device": self.device,
            "folder": str(work),
            **{name: float(numbers[name]) if name in numbers else None
               for name in ("bus", "disk", "block")},
        }  # fmt: skip

    def _judged_equal(self, plan: Plan, row: dict[str, Any]) -> dict[str, Any]:
        """Streamed weights compute bit for bit what resident ones do: else no time is shown.

        Where nothing but the same way ran before there is nothing to compare with.
        """
        outcome = row.pop("outcome", None)
        if outcome is not None:
            stage = plan.contender.partition(" ")[0]
            mine = (plan.contender, outcome)
            way, first = self._equal.setdefault((stage, plan.size, plan.steps), mine)
            row["agrees"] = None if way == plan.contender else outcome == first
        return believed(plan, row)

    def _model(self, plan: Plan) -> Path:
        return place(self.folder, plan.size if plan.size in self.sides else self.base)

    def _noise(self, plan: Plan) -> str:
        """Latents to decode, of any size: noise."""
        return str(inputs.noise(self._work("inputs"), plan.size))

    def _filled(self, word: str, plan: Plan, model: Path) -> str:
        """A word of a command, or the file that it stands for, made where there is none yet."""
        with self._making:
            if word == "{embeds}":
                return str(inputs.embeddings(self._work("inputs"), model))
            if word == "{latents}":
                return str(inputs.latents(self._work("inputs"), model, plan.size))
        return word

    def _work(self, key: str) -> Path:
        work = self.folder / "outputs" / re.sub(r"\W+", "-", key)
        work.mkdir(parents=True, exist_ok=True)
        return work

    def _json_of(
        self, command: Sequence[str], plan: Plan
    ) -> tuple[dict[str, Any] | None, str | None]:
        return json_of(command, self._left(), environment(cache_of(self.folder, plan)))

    def _left(self, rows: int = 1) -> float:
        """Seconds that so many rows may take."""
        return max(1.0, min(rows * self.timeout, self.ends - time.monotonic()))


def believed(plan: Plan, row: dict[str, Any]) -> dict[str, Any]:
    """The row without times where they mean nothing: run beside others, or another output."""
    row |= {"timed": plan.timed and row.get("agrees") is not False}
    if row["timed"]:
        return row
    for part in (row, *row.get("stages", ())):
        for name in _TIMES:
            if name in part:
                part[name] = None
    return row


def _cannot(why: str | None) -> dict[str, Any]:
    return {"ok": False, "error": f"cannot: {why}"}


def _said(ended: str, stage: str) -> str:
    """How a command of lowvram ended, as an outcome of a row."""
    if ended.startswith("exit code 6:"):
        return f"out of memory at {stage}"
    return f"cannot: {ended.partition(': ')[2].removeprefix('lowvram: ') or ended}"
