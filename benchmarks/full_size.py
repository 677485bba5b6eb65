"""The full-size path once for real: every stage at its true size, with random weights.

    nice python benchmarks/full_size.py

T5-XXL encodes a prompt (whole in bfloat16, then in 4 bits), PixArt XL/2 takes two steps at 512 px,
the SDXL-sized VAE decodes at 512 px. Each row is the product's own command line in a process of its
own; one that fails or runs out of memory is a row too. The checkpoint (11 GB in bfloat16) is made
under `--folder` first and read cold from the disk. Results go to `benchmarks/results/full_size.*`;
the last line on stdout is one compact JSON. `--rows decode` measures one row again and keeps the
others, `--rows 8bit` adds T5-XXL in 8 bits, `--size tiny` tries the benchmark itself.
"""

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the code beside this file, whatever is installed

from lowvram import artifacts  # noqa: E402

PROMPT = "a large blue star on a yellow background"
LIBRARIES = ("torch", "transformers", "diffusers", "bitsandbytes", "safetensors")
_SAMPLE_SECONDS = 0.2


@dataclass(frozen=True)
class Row:
    """One run of the command line.

    Attributes:
        component: folder of the checkpoint that it loads.
        arguments: with {model}, {embeds}, {latents} and {out} for the files.
    """

    name: str
    component: str
    arguments: tuple[str, ...]


_ENCODE = ("encode", PROMPT, "-m", "{model}", "-o", "{out}", "--no-cache", "--weights")
_DENOISE = ("denoise", "{embeds}", "--steps", "2", "-o", "{out}")
_DECODE = ("decode", "{latents}", "-o", "{out}")
ROWS = {  # in the order in which they run: each needs files of those before
    "whole": Row("T5-XXL encode, whole", "text_encoder", (*_ENCODE, "whole")),
    "4bit": Row("T5-XXL encode, 4 bits", "text_encoder", (*_ENCODE, "4bit")),
    "8bit": Row("T5-XXL encode, 8 bits", "text_encoder", (*_ENCODE, "8bit")),
    "stream": Row("T5-XXL encode, streamed by blocks", "text_encoder", (*_ENCODE, "stream")),
    "stream-0.25": Row(
        "T5-XXL encode, streamed in 0.25 GB",
        "text_encoder",
        (*_ENCODE, "stream", "--stage-budget", "0.25GB"),
    ),
    "denoise": Row("PixArt XL/2, 2 steps, 512 px", "transformer", _DENOISE),
    "denoise-stream": Row(
        "PixArt XL/2, 2 steps, 512 px, streamed", "transformer", (*_DENOISE, "--weights", "stream")
    ),
    "denoise-stream-0.27": Row(
        "PixArt XL/2, 2 steps, 512 px, streamed in 0.27 GB",
        "transformer",
        (*_DENOISE, "--weights", "stream", "--stage-budget", "0.27GB"),
    ),
    "decode": Row("VAE decode, 512 px", "vae", _DECODE),
    "strips": Row("VAE decode, 512 px, strips", "vae", (*_DECODE, "--decode", "strips")),
}
DEFAULT_ROWS = ("whole", "4bit", "denoise", "decode")
WRITES = {"encode": "x.embeds.safetensors", "denoise": "x.latents.safetensors", "decode": "x.png"}


def main() -> int:
    """Return 1 if a row failed."""
    parser = argparse.ArgumentParser(description="Run every stage once at its true size.")
    parser.add_argument("--folder", type=Path, default=ROOT / ".checkpoints", help="%(default)s")
    parser.add_argument("--size", choices=("published", "tiny"), default="published")
    parser.add_argument("--dtype", default="bfloat16", help="of the files (default: %(default)s)")
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=DEFAULT_ROWS)
    parser.add_argument("--timeout", type=float, default=3600, help="seconds a row may take")
    parser.add_argument("--results", type=Path, help="folder (default: benchmarks/results)")
    options = parser.parse_args()
    trial = options.size != "published"  # must not replace real figures
    results = options.results or (options.folder if trial else ROOT / "benchmarks" / "results")

    model = options.folder.resolve() / f"pixart-sigma-512-{options.size}-{options.dtype}"
    made = [sys.executable, "-m", "scripts.make_checkpoint", str(model), "--sample-size", "64"]
    made += ["--size", options.size, "--dtype", options.dtype]
    if subprocess.run(made, cwd=ROOT).returncode:
        return 1
    document: dict[str, Any] = {"benchmark": "full_size", "size": options.size}
    document |= {"files_dtype": options.dtype, "prompt": PROMPT, "machine": machine()}
    measured = earlier(results / "full_size.json", document)
    for key in (key for key in ROWS if key in options.rows):
        measured[key] = measure(ROWS[key], model, options.timeout)
        document["rows"] = {key: measured[key] for key in ROWS if key in measured}
        results.mkdir(parents=True, exist_ok=True)
        text = json.dumps(document, indent=2) + "\n"
        (results / "full_size.json").write_text(text, encoding="utf-8")
        (results / "full_size.md").write_text(markdown(document), encoding="utf-8")
    print(markdown(document))
    short = ("name", "ok", "seconds", "weights_bytes", "peak_rss_bytes")
    brief = [{name: row[name] for name in short} for row in document["rows"].values()]
    print(json.dumps({"benchmark": "full_size", "rows": brief}, separators=(",", ":")))
    return int(not all(row["ok"] for row in document["rows"].values()))


def earlier(path: Path, document: dict[str, Any]) -> dict[str, Any]:
    """The rows of an earlier run of the same benchmark on the same machine and libraries."""
    if not path.is_file():
        return {}
    before: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    same = all(before.get(name) == value for name, value in document.items())
    return dict(before["rows"]) if same else {}


def measure(row: Row, model: Path, timeout: float) -> dict[str, Any]:
    """Run a row and say how it went."""
    work = model.with_name(model.name + "-files")
    work.mkdir(exist_ok=True)
    stage = row.arguments[0]
    out = work / WRITES[stage]
    result: dict[str, Any] = {"name": row.name, "ok": False, "error": None}
    result["command"] = f"lowvram {shlex.join(row.arguments)}".replace("'{", "{").replace("}'", "}")
    result |= {"measured": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC"}
    result |= {
        "checkpoint_bytes": evict(model / row.component),
        "load_average": psutil.getloadavg()[0],
    }
    result |= dict.fromkeys(("seconds", "weights_bytes", "peak_rss_bytes"))
    places = {"model": model, "out": out}
    places |= {"embeds": work / WRITES["encode"], "latents": work / WRITES["denoise"]}
    say(f"{row.name} …")
    arguments = [argument.format_map(places) for argument in row.arguments]
    run = run_once([sys.executable, "-m", "lowvram", *arguments, "--json"], timeout)
    result |= {name: run[name] for name in ("wall_seconds", "cpu_seconds", "peaks_seen")}
    try:
        result |= json.loads(run["output"])["stages"][0]
    except (ValueError, LookupError):
        run["error"] = run["error"] or "no report on stdout"
    if run["error"]:
        result["error"] = run["error"].replace(str(model.parent), "FOLDER").replace(str(ROOT), ".")
    else:
        result |= {"ok": True} | (tokens(out) if stage == "encode" else {})
    say(f"{row.name}: {result['error'] or 'ok'}, {run['wall_seconds']:.0f} s")
    return result


def run_once(command: Sequence[str], timeout: float) -> dict[str, Any]:
    """Output, error (None if none), seconds and the peaks seen from outside of one process."""
    started, cpu_before = time.monotonic(), cpu_of_children()
    with tempfile.TemporaryFile("w+", encoding="utf-8") as errors:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=errors, encoding="utf-8"
        )
        peaks: dict[str, int] = {}
        watcher = threading.Thread(target=watch, args=(process.pid, peaks), daemon=True)
        watcher.start()
        error = None
        try:
            output, _ = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            output, _ = process.communicate()
            error = f"stopped after {timeout:.0f} s"
        errors.seek(0)
        lines = [line.strip() for line in errors.read().splitlines() if line.strip()]
    if process.returncode and not error:
        # Linux kills a process that exhausts the memory with signal 9 and says nothing.
        how = f"exit code {process.returncode}" + " (out of memory?)" * (process.returncode == -9)
        error = f"{how}: {lines[-1] if lines else 'no message'}"
    seconds, cpu_seconds = time.monotonic() - started, cpu_of_children() - cpu_before
    result = {"output": output, "error": error, "peaks_seen": peaks or None}
    return result | {"wall_seconds": seconds, "cpu_seconds": cpu_seconds}


def cpu_of_children() -> float:
    """Seconds on the CPU of all processes that were started here and have ended."""
    times = psutil.Process().cpu_times()
    return float(times.children_user + times.children_system)


def watch(pid: int, peaks: dict[str, int]) -> None:
    """Keep the peaks of a process tree's memory until it ends, by kind, in bytes.

    Linux only. Resident pages of files ("file": weights that are mapped, libraries) can be dropped
    at any time, "anonymous" ones are what the process cannot do without.
    """
    while True:
        now = dict.fromkeys(("anonymous", "file", "resident"), 0)
        try:
            for process in process_tree(pid):
                status = Path(f"/proc/{process}/status").read_text(encoding="utf-8")
                fields = dict(line.split(":", 1) for line in status.splitlines())
                for kind, field in (("anonymous", "RssAnon"), ("file", "RssFile")):
                    now[kind] += int(fields[field].split()[0]) * 1024
                now["resident"] += int(fields["VmRSS"].split()[0]) * 1024
        except (OSError, LookupError, psutil.Error):
            return
        for kind, amount in now.items():
            peaks[kind] = max(peaks.get(kind, 0), amount)
        time.sleep(_SAMPLE_SECONDS)


def process_tree(pid: int) -> Iterator[int]:
    """The process and all it started."""
    yield pid
    for child in psutil.Process(pid).children(recursive=True):
        yield child.pid


def evict(folder: Path) -> int:
    """Drop a component's files from the page cache, so that every run reads them; their bytes."""
    total = 0
    for path in sorted(folder.glob("*.safetensors")):
        total += path.stat().st_size
        if hasattr(os, "posix_fadvise"):
            with open(path, "rb") as file:
                os.fsync(file.fileno())  # pages that are not yet on the disk would stay
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return total


def tokens(path: Path) -> dict[str, int]:
    """Tokens of the prompt and the negative prompt, as the embeddings' header has them."""
    item = artifacts.read_header(path, "embeds").items[0]
    return {name: item[name] for name in ("tokens", "negative_tokens")}


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    cpu = platform.processor() or platform.machine()
    facts = Path("/proc/cpuinfo")
    if facts.is_file():
        lines = [line.split(":", 1) for line in facts.read_text().splitlines() if ":" in line]
        known = {key.strip(): value.strip() for key, value in lines}
        sets = [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
                if name in known.get("flags", "").split()]  # fmt: skip
        cpu = " ".join([known.get("model name", cpu), *sets])
    return {
        "cpu": cpu,
        "cores": psutil.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **{name: version(name) for name in LIBRARIES},
    }


def markdown(document: dict[str, Any]) -> str:
    """The results as a page."""
    facts = document["machine"]
    libraries = ", ".join(f"{name} {facts[name]}" for name in LIBRARIES)
    lines = [
        "# Full size, with random weights",
        "",
        "Written by `benchmarks/full_size.py`; every figure with its command is in "
        "`full_size.json`.",
        "",
        f"{facts['cpu']}, {facts['cores']} cores, {facts['memory_bytes'] / 1e9:.0f} GB memory; "
        f"{libraries}. Files in {document['files_dtype']}, read cold from the disk. Sizes are "
        "decimal; “anonymous” is the resident peak without the pages of mapped files. CPU seconds "
        "are of the whole process, with imports.",
        "",
        "| stage | computes in | tokens | files | weights | load | compute | CPU "
        "| peak resident | anonymous | load average |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in document["rows"].values():
        if not row["ok"]:
            lines.append(f"| {row['name']} | failed: {row['error']} |" + " |" * 9)
            continue
        counted = "+".join(str(row[n]) for n in ("tokens", "negative_tokens") if n in row)
        sizes = [gigabytes(row["checkpoint_bytes"]), gigabytes(row["weights_bytes"])]
        timed = ("load_seconds", "compute_seconds", "cpu_seconds")
        seconds = [f"{row[name]:.1f} s" for name in timed]
        seen = (row["peaks_seen"] or {}).get("anonymous")
        cells = [row["name"], row["dtype"], counted or "–", *sizes, *seconds]
        cells += [gigabytes(row["peak_rss_bytes"]), gigabytes(seen), f"{row['load_average']:.1f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def gigabytes(amount: int | None) -> str:
    """GB with two decimals; a dash where it is not known."""
    return "–" if amount is None else f"{amount / 1e9:.2f} GB"


def say(line: str) -> None:
    """What is going on, for people."""
    print(f"full_size: {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
