"""The README's table, from what `make run` leaves.

make run && .venv/bin/python benchmarks/readme_table.py
"""

import json
import sys
from pathlib import Path

from tables import set_table

ROOT = Path(__file__).parents[1]


def main(run: Path = ROOT / "runs" / "quickstart") -> None:
    """Read quickstart.json and set the README's table."""
    table = json.loads((run / "quickstart.json").read_text(encoding="utf-8"))["markdown"].rstrip()
    set_table(ROOT / "README.md", "quickstart", table)
    print(table)


if __name__ == "__main__":
    main(*(Path(argument) for argument in sys.argv[1:2]))
