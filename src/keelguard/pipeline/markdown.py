"""Foreign text inside Markdown: it is shown as it is, and means nothing to whoever renders it."""

import re

from keelguard.plots import legible

_SPECIAL = re.compile(r"([\\`*_{}\[\]<>#|~!$])")
_START = re.compile(r"^([-+=]|\d+(?=[.)](?:\s|$)))")
# An interval is no link unless something to link to follows.
_INTERVAL = re.compile(r"\\\[([\d., −+-]+)\\\](?![(\[:])")


def plain(text: str) -> str:
    """One line in which no character is markup, link, image, HTML or a table's border."""
    text = " ".join(legible(text).split()).replace("&", "&amp;")
    text = _INTERVAL.sub(r"[\1]", _SPECIAL.sub(r"\\\1", text)).replace("://", "\\://").replace("www.", "www\\.")
    return _START.sub(lambda match: _hold(match[1]), text)


def code(text: str) -> str:
    """A name or a hash in fixed width, inside a table too; a dash where there is none."""
    text = " ".join(legible(text).split())
    if not text:
        return "–"
    if re.fullmatch(r"[\w./:@+ -]+", text):
        return f"`{text}`"
    # In a code span a border must be escaped inside a table and must not outside of one: here it is plain text.
    return plain(text)


def _hold(start: str) -> str:
    """What would begin a list or a heading, made a letter."""
    return f"\\{start}" if not start.isdigit() else f"&#{ord(start[0])};{start[1:]}"
