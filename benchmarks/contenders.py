"""One measurement of one contender, in a process of its own: ``python -m benchmarks.contenders MEASURE CONTENDER ...``.

Prints one line of JSON. All contenders get the same text and the same clock; the peers run as their users run them.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks import browser, generation, pipeline, training  # noqa: F401 - each enters its contenders
from benchmarks.common import MEASURES, SETTLED, SHAKESPEARE, NotMeasuredError
from minigpt.runtime import cpu

__all__ = ["MEASURES", "main"]


def main() -> None:
    """Measure one contender once. If it cannot be measured here, report the reason as ``missing``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("measure", choices=MEASURES)
    parser.add_argument("contender")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--text", type=Path, default=SHAKESPEARE)
    parser.add_argument("--loss", type=float, default=1.88)
    parser.add_argument("--megabytes", type=int, default=100)
    parser.add_argument("--round", type=int, default=0)
    options = parser.parse_args()
    ours = options.device == "cpu" and options.contender.startswith("minigpt") and "encoding" not in options.measure
    if ours or options.contender.endswith(SETTLED):  # as the project's own programs do; the one that encodes does not
        here = "in a page" not in options.measure  # a browser needs the cores that threads of this process would keep
        cpu.configure_cpu(spin=here and options.measure.startswith(("writing", "first")))
    try:
        measured: dict[str, Any] = MEASURES[options.measure][options.contender](options)
    except (ImportError, NotMeasuredError) as error:
        measured = {"missing": str(error)}
    print(json.dumps(measured))


if __name__ == "__main__":
    main()
