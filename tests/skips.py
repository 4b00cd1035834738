"""Who decides what a skipped test means: its class, if that has a `judge_skip`.

Upstream's tests are skipped in many ways (decorators, marks, in the middle of a test or of a part of one); a report of
pytest is where all of them arrive.
"""

from collections.abc import Generator

import pytest


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Turn a skip into a failure where `judge_skip(name, reason)` of the test's class tells why it is one."""
    report = yield
    judge = getattr(getattr(item, "cls", None), "judge_skip", None)
    if judge and report.skipped:
        told = report.longrepr[2] if isinstance(report.longrepr, tuple) else "expected to fail"
        if failure := judge(item.name, told.removeprefix("Skipped: ")):
            report.outcome, report.longrepr = "failed", failure
    return report
