"""MkDocs hooks: pages that show a file of the repository's root, and links to files outside docs/.

Such links, as to ../deploy/README.md, become plain text on the website. They work where the repository is read as files. A
link to a file that does not exist stays, and fails the strict build.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

SHOWN = {"contributing.md": "CONTRIBUTING.md", "architecture.md": "ARCHITECTURE.md"}
"""page -> file of the root that the website shows in its place"""
LINK = re.compile(r"\[([^\]]+)\]\((\.\./[^)#\s]+)(#[^)\s]*)?\)")
LINK_IN_ROOT = re.compile(r"\]\((?![a-z]+:|#)([^)\s]+)\)")


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Any) -> str:
    """Return the page's text, or that of the file it stands for, without links to existing files outside docs/."""
    docs, folder = Path(config.docs_dir), Path(page.file.abs_src_path).parent
    if name := SHOWN.get(page.file.src_uri):
        text = (docs.parent / name).read_text("utf-8")
        markdown = LINK_IN_ROOT.sub(lambda link: f"]({_seen_from_docs(link[1])})", text)

    def text_or_link(link: re.Match[str]) -> str:
        target = (folder / link[2]).resolve()
        return link[1] if target.exists() and not target.is_relative_to(docs) else link[0]

    return LINK.sub(text_or_link, markdown)


def _seen_from_docs(target: str) -> str:
    return target.removeprefix("docs/") if target.startswith("docs/") else f"../{target}"
