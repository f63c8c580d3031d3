"""A hook of MkDocs: patterns in the navigation, such as ops/*.md, become the pages that match, by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def expanded(nav: Any, folder: Path) -> Any:
    """Return a navigation, or a part of it, with its patterns replaced by lists of pages."""
    if isinstance(nav, list):
        return [expanded(item, folder) for item in nav]
    if isinstance(nav, dict):
        return {title: expanded(item, folder) for title, item in nav.items()}
    return sorted(str(page.relative_to(folder)) for page in folder.glob(nav)) if "*" in nav else nav


def on_config(config):
    """Expand the navigation before MkDocs reads it."""
    config.nav = expanded(config.nav, Path(config.docs_dir))
    return config
