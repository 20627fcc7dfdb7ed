"""`python -m qtrain`, and the console script."""

from __future__ import annotations

import sys

from qtrain.cli import main as run


def main() -> int:
    """Run the command line of this process."""
    return run(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
