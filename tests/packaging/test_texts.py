"""Checks of the repository's text."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
# Dated reports of one run each.
REPORTS = ("gpu-report-h100.md", "gpu-report-h200.md", "gpu-results.md")


def test_no_page_counts_tests():
    """The number of tests changes daily, so a page that states one is soon wrong."""
    pages = [*ROOT.glob("*.md"), *ROOT.glob("*/README.md"), *(ROOT / "docs").rglob("*.md")]
    counts = re.compile(r"\b\d[\d,]* (?:passed|skipped|tests|test files)\b")
    found = {
        str(page.relative_to(ROOT)): counts.findall(page.read_text()) for page in pages if page.name not in REPORTS
    }
    assert not {page: text for page, text in found.items() if text}
