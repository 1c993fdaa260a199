"""Links that lead from a page to a file of the code, which is no part of the site."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

LINK = re.compile(r"\[([^\]]*)\]\((\.\.[^)#]*)(#[^)]*)?\)")


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Show a link to a file beside ``docs`` as its path; the file must exist."""
    docs = Path(config.docs_dir).resolve()
    here = docs / Path(page.file.src_uri).parent

    def shown(match: re.Match[str]) -> str:
        target = (here / match[2]).resolve()
        if target.is_relative_to(docs) or not target.exists():
            return match[0]  # of the site, or for mkdocs to complain about
        return f"`{target.relative_to(docs.parent)}`"

    return LINK.sub(shown, markdown)
