"""``python -m refrag.training.distill``: ``refrag train distill`` without the command line's packages."""

from __future__ import annotations

import sys

from refrag.training.command_line import parse
from refrag.training.distill.options import DistillOptions


def main() -> int:
    """Run a distillation from the command line."""
    try:
        options = parse(DistillOptions, "python -m refrag.training.distill")
        from refrag.training.distill.loop import distill

        distill(options)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
