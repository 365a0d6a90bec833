"""`make bench`: runs every benchmark and writes its table to benchmarks/results/."""

from __future__ import annotations

from .loop import main

if __name__ == "__main__":
    main()
