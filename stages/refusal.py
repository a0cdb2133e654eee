"""A stage's way out when the input is wrong rather than the code: one line, exit 2, nothing written."""

import sys
from collections.abc import Callable


class Refusal(Exception):
    """What is wrong, where (file, row, field), and what to do about it, in one line."""

    def __str__(self) -> str:
        return " ".join(super().__str__().split())


def run(main: Callable[[list[str]], None]) -> None:
    """Call `main` with the command line's arguments; a Refusal becomes one line on stderr and exit status 2."""
    try:
        main(sys.argv[1:])
    except Refusal as refusal:
        print(f"error: {refusal}", file=sys.stderr)
        sys.exit(2)
