"""Counts of checks, by kind: each mutation and each kill is one."""

from collections import Counter

import pytest

COUNTS = pytest.StashKey[Counter]()


@pytest.fixture
def count_check(request):
    """Count one decided check of a kind; the totals are printed at the end."""
    counts = request.config.stash.setdefault(COUNTS, Counter())

    def count(kind: str, number: int = 1) -> None:
        counts[kind] += number

    return count


def pytest_terminal_summary(terminalreporter, config):
    counts = config.stash.get(COUNTS, None)
    if counts:
        terminalreporter.section("checks by kind")
        for kind, number in sorted(counts.items()):
            terminalreporter.write_line(f"{number:6,}  {kind}")
        terminalreporter.write_line(f"{counts.total():6,}  in all, each decided")
