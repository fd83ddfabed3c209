"""A dump of wiki pages -> plain prose: light, for reading by a language model and not for layout."""

from __future__ import annotations

import bz2
import html
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from xml.etree import ElementTree

# What ends an article: lists of sources and links.
CLOSING = re.compile(
    r"^==\s*(?:references|external links|see also|notes|further reading|bibliography|footnotes|sources"
    r"|citations|notes and references|references and notes|works cited|published works|gallery)\b[^=]*==\s*\n"
    r".*?(?=^==[^=]|\Z)",
    re.IGNORECASE | re.MULTILINE | re.DOTALL,
)
HIDDEN = re.compile(
    r"<!--.*?-->|<ref\b[^>]*/>|<(ref|math|gallery|timeline|table|code|pre|source|score|imagemap|div)\b[^>]*>.*?</\1\s*>",
    re.IGNORECASE | re.DOTALL,
)
TEMPLATE = re.compile(r"\{\{([^{}]*)\}\}")
TABLE = re.compile(r"\{\|(?:(?!\{\||\|\}).)*\|\}", re.DOTALL)
LINK = re.compile(r"\[\[([^\[\]]*)\]\]")
ADDRESS = re.compile(r"\[(?:https?:)?//[^\s\]]+\s*([^\]]*)\]|\bhttps?://[^\s<>\]|]+")
FILE = re.compile(r"\s*(?:file|image|media|category)\s*:", re.IGNORECASE)
PREFIX = re.compile(
    r":?[a-zA-Z-]{2,10}:(?=\S)"
)  # another wiki or namespace ("2001: A Space Odyssey" is a title)


def articles(dump: Path) -> Iterator[tuple[str, str]]:
    """(title, wikitext) of every article of a compressed dump, redirects and other namespaces left out."""
    with bz2.open(dump) as file:
        for _, page in ElementTree.iterparse(file):
            if not page.tag.endswith("}page"):
                continue
            title, space, text = (page.findtext(f".//{{*}}{name}") or "" for name in ("title", "ns", "text"))
            if space == "0" and page.find("{*}redirect") is None and text:
                yield title, text
            page.clear()


def plain(wikitext: str) -> str:
    """Prose of one page, a paragraph, list item or heading per line.

    Templates, tables, references, files, categories and markup go; so do the closing sections that
    only list sources and links. The words of links and of foreign-language templates stay.
    """
    text = HIDDEN.sub("", wikitext.replace("\u00a0", " "))
    text = _innermost(TEMPLATE, _template, text)
    text = _innermost(TABLE, lambda _: "", text)
    text = _innermost(LINK, _link, ADDRESS.sub(lambda found: found[1] or "", text))
    text = re.sub(r"<br\s*/?>", " ", text, flags=re.IGNORECASE)
    text = html.unescape(re.sub(r"</?[a-zA-Z][^<>]*>", "", text)).replace("\u00a0", " ")
    text = CLOSING.sub("", re.sub(r"'{2,}|__[A-Z]+__", "", text))
    lines = (_line(line) for line in text.split("\n"))
    return _without_empty_headings([line for line in lines if line])


def _innermost(pattern: re.Pattern[str], replace: Callable[[re.Match[str]], str], text: str) -> str:
    """Apply until nothing changes: what is nested goes first."""
    while (changed := pattern.sub(replace, text)) != text:
        text = changed
    return text


def _template(found: re.Match[str]) -> str:
    """The words of the few templates that hold words of the sentence; nothing for all others."""
    name, *values = (part.strip() for part in found[1].split("|"))
    unnamed = [value for value in values if not re.match(r"\w+\s*=", value)]
    name = name.lower()
    if name.startswith("formatnum:"):
        return name.partition(":")[2]
    if not unnamed:
        return ""
    if name in ("quote", "nowrap", "abbr", "sic", "nihongo"):
        return unnamed[0]
    if name == "lang" or name.startswith(("lang-", "transl")):
        return unnamed[-1]
    if name in ("convert", "cvt") and len(unnamed) > 1:
        return " ".join(unnamed[:4] if unnamed[1] in ("to", "and", "-", "\u2013") else unnamed[:2])
    return ""


def _link(found: re.Match[str]) -> str:
    """The label; nothing for files, categories and bare links to other wikis."""
    target, *labels = found[1].split("|")
    if FILE.match(target):
        return ""
    return labels[-1] if labels else "" if PREFIX.match(target) else target


def _line(line: str) -> str:
    """Without list marks and the gaps that removed templates leave; headings keep one mark for now."""
    line = line.strip()
    if heading := re.fullmatch(r"(={2,6})\s*(.*?)\s*=+", line):
        return f"{heading[1]}{heading[2]}" if heading[2] else ""
    if line.startswith(("|", "!", "{|", "}}", "{{", "----")):
        return ""  # left over from a table or template that is not balanced
    line = re.sub(r"^[*#:;\s]+|\[\[|\]\]|\{\{|\}\}", "", line)
    for _ in range(2):
        line = re.sub(r"\(\s*[,;:.\s]*\s*\)|\[\s*\]", "", line)
        line = re.sub(r"\(\s*[,;:]*\s+", "(", line)
        line = re.sub(r"[,;:]\s*\)", ")", line)
        line = re.sub(r"\s+([,.;:)])", r"\1", " ".join(line.split()))
    return line if re.search(r"\w", line) else ""


def _without_empty_headings(lines: list[str]) -> str:
    """A heading stays where something below it does."""
    kept: list[str] = []
    for line in reversed(lines):
        level = len(line) - len(line.lstrip("="))
        below = len(kept[-1]) - len(kept[-1].lstrip("=")) if kept else 2
        if not level or not (kept == [] or (below and below <= level)):
            kept.append(line)
    return "\n".join(line.lstrip("=") for line in reversed(kept))
