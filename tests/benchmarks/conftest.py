"""Results as a benchmark would write them."""

from typing import Any

import pytest

MACHINE = {"device": "Quick CPU @ 3.00GHz", "kind": "cpu", "cores": 2, "threads": 2, "memory_gib": 7.8, "python": "3.11.7"}
MACHINE |= {"driver": None, "torch": "2.13.0", "trl": None}


@pytest.fixture
def make_result():
    """make_result(rows, **fields) -> the content of a result file of a benchmark "quick", whose rows all fields tell apart."""

    def make(rows: list[dict[str, Any]], **fields: Any) -> dict[str, Any]:
        content = {
            "benchmark": "quick",
            "command": "python -m benchmarks.quick --steps 3",
            "when": "2026-02-03T04:05:06+00:00",
            "commit": "0123456789abcdef",
            "machine": dict(MACHINE),
            "settings": {"steps": 3, "model": {"layers": 4}},
            "complete": True,
            "rows": rows,
        }
        return content | fields

    return make


@pytest.fixture
def spread():
    """spread(low, median, high) as measure.spread gives it."""
    return lambda low, median, high: {"median": median, "low": low, "high": high, "samples": 5}
