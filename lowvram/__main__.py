"""`python -m lowvram`."""

import sys

from lowvram.errors import INTERRUPTED_EXIT_CODE


def main() -> None:
    """The command line; Ctrl-C while it is imported is one line, too."""
    try:
        from lowvram.cli import main as command_line

        command_line()
    except KeyboardInterrupt:
        print("lowvram: interrupted", file=sys.stderr)  # noqa: T201
        sys.exit(INTERRUPTED_EXIT_CODE)


if __name__ == "__main__":
    main()
