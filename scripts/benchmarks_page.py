"""Write benchmarks/README.md from benchmarks/results: `python scripts/benchmarks_page.py`.

`--check` writes nothing and exits with 1 and one line when the page is stale; `scripts/check` calls
it. Run it inside `.venv`. The text depends on the result files and the code in benchmarks/ only.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main() -> int:
    """Write the page, or only compare it; return 1 if it is stale or cannot be made."""
    parser = argparse.ArgumentParser(description="Write benchmarks/README.md from the results.")
    parser.add_argument("--check", action="store_true", help="only say whether it is up to date")
    parser.add_argument("--folder", type=Path, default=ROOT / "benchmarks", help="%(default)s")
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT))  # the code beside this file, whatever is installed
    from benchmarks.page.page import page, read

    path = options.folder / "README.md"
    try:
        text = page(read(options.folder / "results"))
    except ValueError as error:
        print(error)
        return 1
    if not options.check:
        path.write_text(text, encoding="utf-8", newline="\n")
        return 0
    if path.is_file() and path.read_text(encoding="utf-8") == text:
        return 0
    print("benchmarks/README.md is stale: run scripts/check --fix.")
    return 1


if __name__ == "__main__":
    raise SystemExit(main())
