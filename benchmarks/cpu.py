"""Side by side on a CPU: what people use today, and `lowvram`, each in a process of its own.

    benchmarks/cpu.sh            # everything, on two cores and 24 GB: under an hour
    benchmarks/cpu.sh --quick    # the demo model and tiny networks: under five minutes

`demo` rows make pictures end to end with the model in this package, every contender of
`benchmarks/baselines`, and say how far each picture is from the fp32 one-shot pipeline's. `true`
rows have the true sizes with random weights (made once under `--folder`, 11 GB): the published
recipe and `lowvram` end to end at 512 px in few steps, and each stage in each way, read cold from
the disk. `tiny` rows try the same on tiny networks. A row that fails, cannot be or is stopped is a
row too; one that lacks an earlier row's file is not run, and what was known of it stays, marked as
not measured again. Each is saved to `benchmarks/results/cpu.json` as soon as it is measured;
`--rows` picks. The last line on stdout is one compact JSON.
"""

import argparse
import fnmatch
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the code beside this file, whatever is installed

from benchmarks.cpu_rows import Place, Row, rows_of  # noqa: E402
from benchmarks.distance import distance  # noqa: E402
from benchmarks.machine import RESULTS, load_average, recorded, save_rows, saved_rows  # noqa: E402
from benchmarks.watched import evict, run_once  # noqa: E402

_LEFT_OUT = ("timeline", "marks", "predicted", "settings", "left_tensors", "left_behind")
_KEPT = ("ok", "error", "seconds_to_first_picture", "seconds_per_further_picture", "pictures",
         "size", "steps", "dtype")  # fmt: skip
_TIMEOUTS = {"demo": 300.0, "tiny": 120.0, "true": 1200.0}  # seconds a row may take


def main(arguments: Sequence[str] | None = None) -> int:
    """Return 0 where every row was measured, however it ended; 1 where one could not be tried."""
    parser = argparse.ArgumentParser(description="Compare contenders on a CPU.")
    parser.add_argument("--quick", action="store_true", help="the demo model and tiny networks")
    parser.add_argument("--rows", nargs="+", metavar="PATTERN", help="true/*, demo/lowvram/n1, …")
    parser.add_argument("--list", action="store_true", help="name the rows and do nothing")
    parser.add_argument("--folder", type=Path, default=ROOT / ".checkpoints", help="%(default)s")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder (%(default)s)")
    options = parser.parse_args(arguments)
    rows = chosen(rows_of("quick" if options.quick else "full"), options.rows)
    if options.list:
        print("\n".join(rows))
        return 0
    if not rows:
        parser.error("no row has such a name: see --list")
    place, brief = Place(options.folder.resolve()), {}
    for key, row in rows.items():
        if lacks := place.lacks(row):
            why = f"it reads what a row of {lacks} makes, which has to run before"
            say(f"{key}: not run: {why}")
            mark_old(key, why, options.results)
            continue
        say(f"{key} …")
        measured = measure(row, place)
        save_rows("cpu", {key: measured}, options.results)
        brief[key] = short(measured)
        say(f"{key}: {measured['error'] or 'ok'}, {measured['wall_seconds'] or 0:.0f} s")
    print(json.dumps({"benchmark": "cpu", "rows": brief}, separators=(",", ":")))
    return 0 if len(brief) == len(rows) else 1


def mark_old(key: str, why: str, results: Path) -> None:
    """Say in what was known of a row that it was to be measured again, and was not."""
    if known := saved_rows("cpu", results).get(key):
        mark = {"date": recorded()["date"], "why": why}
        save_rows("cpu", {key: {**known, "not_measured_again": mark}}, results)


def chosen(rows: dict[str, Row], patterns: Sequence[str] | None) -> dict[str, Row]:
    """Rows whose key fits one of the patterns; all where there are none."""
    if patterns is None:
        return rows
    return {key: row for key, row in rows.items() if any(fnmatch.fnmatch(key, p) for p in patterns)}


def measure(row: Row, place: Place) -> dict[str, Any]:
    """Run a row and say how it went."""
    result: dict[str, Any] = {"ok": False, "error": None, "part": row.part, "kind": row.kind}
    result |= {"name": row.name, "command": row.shown(), "recorded": recorded()}
    result |= dict.fromkeys(("wall_seconds", "cpu_seconds", "read_bytes", "peaks_seen"))
    missing = place.make(row.part, say)
    if missing:
        return result | {"error": missing}
    output = place.emptied(row.key)
    result["checkpoint_bytes"] = evict(place.model(row.part)) if row.cold else None
    result["load_average"] = load_average()
    run = run_once([sys.executable, "-m", *row.filled(place)], _TIMEOUTS[row.part])
    result |= {name: run[name] for name in ("wall_seconds", "cpu_seconds", "read_bytes")}
    result |= {"peaks_seen": run["peaks_seen"]}
    told = parsed(run["output"])
    result |= {name: value for name, value in told.items() if name not in ("ok", "error")}
    error = run["error"] or ("no report on stdout" if not told else None)
    error = told.get("error") or error
    if error:
        return result | {"error": place.without_paths(str(error))}
    result["ok"] = True
    reference = place.reference(row)
    if reference is not None:
        result["distance"] = distance(output, reference)
    return result


def parsed(output: str) -> dict[str, Any]:
    """The JSON of a contender (its last line) or of a stage of the product (all of it)."""
    lines = output.strip().splitlines()
    for text in (output, lines[-1] if lines else ""):
        try:
            told = json.loads(text)
        except ValueError:
            continue
        if isinstance(told, dict):
            break
    else:
        return {}
    stages = [
        {name: value for name, value in stage.items() if name not in _LEFT_OUT}
        for stage in told.get("stages") or []
    ]
    return {"stages": stages, **{name: told[name] for name in _KEPT if name in told}}


def short(row: dict[str, Any]) -> dict[str, Any]:
    """What the last line has of a row."""
    peaks = row["peaks_seen"] or {}
    seconds = row["wall_seconds"]
    brief = {"ok": row["ok"], "s": seconds and round(seconds, 1), "rss": peaks.get("resident")}
    distant = row.get("distance") or {}
    return brief | ({"levels": distant["largest"]} if "largest" in distant else {})


def say(line: str) -> None:
    """What is going on, for people."""
    print(f"cpu: {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
