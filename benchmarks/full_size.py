"""The full-size path once for real: every stage at its true size, with random weights.

    nice python benchmarks/full_size.py

T5-XXL encodes a prompt (whole in bfloat16, then in 4 bits), PixArt XL/2 takes two steps at 512 px,
the SDXL-sized VAE decodes at 512 px. Each row is the product's own command line in a process of its
own; one that fails or runs out of memory is a row too. The checkpoint (11 GB in bfloat16) is made
under `--folder` first and read cold from the disk. Results go to `benchmarks/results/full_size.*`;
the last line on stdout is one compact JSON. `--size tiny` tries the benchmark itself.
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


def rows(with_8bit: bool) -> list[Row]:
    """What is measured, in order; denoise takes the first embeddings that there are."""
    encode = ("encode", PROMPT, "-m", "{model}", "-o", "{out}", "--weights")
    denoise = ("denoise", "{embeds}", "--steps", "2", "-o", "{out}")
    return [
        Row("T5-XXL encode, whole", "text_encoder", (*encode, "whole")),
        Row("T5-XXL encode, 4 bits", "text_encoder", (*encode, "4bit")),
        *([Row("T5-XXL encode, 8 bits", "text_encoder", (*encode, "8bit"))] if with_8bit else []),
        Row("PixArt XL/2, 2 steps, 512 px", "transformer", denoise),
        Row("VAE decode, 512 px", "vae", ("decode", "{latents}", "-o", "{out}")),
    ]


def main() -> int:
    """Return 1 if a row failed."""
    parser = argparse.ArgumentParser(description="Run every stage once at its true size.")
    parser.add_argument("--folder", type=Path, default=ROOT / ".checkpoints", help="%(default)s")
    parser.add_argument("--size", choices=("published", "tiny"), default="published")
    parser.add_argument("--dtype", default="bfloat16", help="of the files (default: %(default)s)")
    parser.add_argument("--with-8bit", action="store_true", help="also T5-XXL in 8 bits")
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
    with tempfile.TemporaryDirectory(dir=options.folder) as work:
        files = {"model": model}
        measured = [
            measure(row, files, Path(work), options.timeout) for row in rows(options.with_8bit)
        ]
    document = {"benchmark": "full_size", "size": options.size, "files_dtype": options.dtype}
    document |= {"prompt": PROMPT, "machine": machine(), "rows": measured}
    results.mkdir(parents=True, exist_ok=True)
    text = json.dumps(document, indent=2) + "\n"
    (results / "full_size.json").write_text(text, encoding="utf-8")
    (results / "full_size.md").write_text(markdown(document), encoding="utf-8")
    print(markdown(document))
    short = ("name", "ok", "seconds", "weights_bytes", "peak_rss_bytes")
    brief = [{name: row[name] for name in short} for row in measured]
    print(json.dumps({"benchmark": "full_size", "rows": brief}, separators=(",", ":")))
    return int(not all(row["ok"] for row in measured))


def measure(row: Row, files: dict[str, Path], work: Path, timeout: float) -> dict[str, Any]:
    """Run a row and say how it went; what it wrote joins `files` for the rows after it."""
    kind = {"encode": "embeds", "denoise": "latents", "decode": "png"}[row.arguments[0]]
    out = work / f"{row.component}{len(list(work.iterdir()))}{artifacts.SUFFIXES.get(kind, '.png')}"
    component = files["model"] / row.component
    result: dict[str, Any] = {"name": row.name, "ok": False, "error": None}
    result["command"] = f"lowvram {shlex.join(row.arguments)}".replace("'{", "{").replace("}'", "}")
    result |= {"checkpoint_bytes": evict(component), "load_average": os.getloadavg()[0]}
    result |= dict.fromkeys(("seconds", "weights_bytes", "peak_rss_bytes"))
    places = {name: str(path) for name, path in files.items()} | {"out": str(out)}
    try:
        arguments = [argument.format_map(places) for argument in row.arguments]
    except KeyError as missing:
        return result | {"error": f"no {missing.args[0]}: an earlier row failed"}
    say(f"{row.name} …")
    run = run_once([sys.executable, "-m", "lowvram", *arguments, "--json"], timeout)
    result |= {name: run[name] for name in ("wall_seconds", "peaks_seen")}
    try:
        result |= json.loads(run["output"])["stages"][0]
    except (ValueError, LookupError):
        run["error"] = run["error"] or "no report on stdout"
    if run["error"] or not out.is_file():
        result["error"] = str(run["error"]).replace(str(files["model"].parent), "FOLDER")
    else:
        result |= {"ok": True} | tokens(out, kind)
        files.setdefault(kind, out)
    say(f"{row.name}: {result['error'] or 'ok'}, {run['wall_seconds']:.0f} s")
    return result


def run_once(command: Sequence[str], timeout: float) -> dict[str, Any]:
    """Output, error (None if none), seconds and the peaks seen from outside of one process."""
    started = time.monotonic()
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
    seconds = time.monotonic() - started
    return {"output": output, "error": error, "wall_seconds": seconds, "peaks_seen": peaks or None}


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


def tokens(path: Path, kind: str) -> dict[str, int]:
    """Tokens of the prompt and the negative prompt, as the embeddings' header has them."""
    if kind != "embeds":
        return {}
    item = artifacts.read_header(path, kind).items[0]
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
        "decimal; “anonymous” is the resident peak without the pages of mapped files.",
        "",
        "| stage | computes in | tokens | files | weights | load | compute | peak resident "
        "| anonymous | load average |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in document["rows"]:
        if not row["ok"]:
            lines.append(f"| {row['name']} | failed: {row['error']} |" + " |" * 8)
            continue
        counted = "+".join(str(row[n]) for n in ("tokens", "negative_tokens") if n in row)
        sizes = [gigabytes(row["checkpoint_bytes"]), gigabytes(row["weights_bytes"])]
        seconds = [f"{row[name]:.1f} s" for name in ("load_seconds", "compute_seconds")]
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
