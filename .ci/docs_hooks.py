"""MkDocs hook: links from docs/ to files outside it, such as ../deploy/README.md, become plain text on the website.

They work where the repository is read as files. A link to a file that does not exist stays, and fails the strict build.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

LINK = re.compile(r"\[([^\]]+)\]\((\.\./[^)#\s]+)(#[^)\s]*)?\)")


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Any) -> str:
    """Return the page's text without its links to existing files outside the documentation."""
    docs, folder = Path(config.docs_dir), Path(page.file.abs_src_path).parent

    def text_or_link(link: re.Match[str]) -> str:
        target = (folder / link[2]).resolve()
        return link[1] if target.exists() and not target.is_relative_to(docs) else link[0]

    return LINK.sub(text_or_link, markdown)
