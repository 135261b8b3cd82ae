"""Small mistakes put into a kernel's source, one at a time.

`find_sites(source)` lists where a mistake can be made, `mutate(source, site)` makes it. A test
builds the mutant in the simulator under the sanitizer named by `SANITIZER_OF[site.kind]` and
expects it to fail.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

# A missing barrier, fence or atomic is a data race; a missing bounds check a stray access.
SANITIZER_OF = {
    "barrier": "thread",
    "fence": "thread",
    "atomic": "thread",
    "bounds": "address",
}

_OPERAND = r"[\w.]+(?:\[[\w.]+\])?"
_PATTERNS = [
    ("barrier", re.compile(r"\b__syncthreads\s*\(\s*\)\s*;"), ";"),
    ("barrier", re.compile(r"\b__syncthreads_(?:or|and|count)\s*\("), "static_cast<int>("),
    ("barrier", re.compile(r"\b__syncwarp\s*\([^()]*\)\s*;"), ";"),
    ("fence", re.compile(r"\b__threadfence(?:_block)?\s*\(\s*\)\s*;"), ";"),
    ("atomic", re.compile(r"(?<!::)\b(atomic(?:Add|Sub|Max|Min|Or|And|Xor|Exch|CAS|Inc))\s*\("),
     r"::plain::\1("),
    ("bounds", re.compile(rf"\bif\s*\(\s*{_OPERAND}\s*<\s*{_OPERAND}\s*\)"), "if (true)"),
    ("bounds", re.compile(rf"\bif\s*\(\s*{_OPERAND}\s*>=\s*{_OPERAND}\s*\)\s*return\s*;"), ";"),
    ("bounds", re.compile(rf"{_OPERAND}\s*<\s*{_OPERAND}\s*\?"), "true ?"),
]  # fmt: skip
_NOT_CODE = re.compile(r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"', re.DOTALL)


@dataclass(frozen=True)
class Site:
    """One place for one mistake. `name` survives edits elsewhere in the file."""

    kind: str
    name: str
    start: int
    end: int
    replacement: str


def find_sites(source: str) -> list[Site]:
    code = _NOT_CODE.sub(lambda match: re.sub(r"[^\n]", " ", match.group()), source)
    found = []
    for kind, pattern, template in _PATTERNS:
        for match in pattern.finditer(code):
            found.append((match.start(), match.end(), kind, match.expand(template)))
    sites = []
    seen: Counter[str] = Counter()
    for start, end, kind, replacement in sorted(found):
        name = f"{kind}: {_place(code, start, end)}"
        seen[name] += 1
        if seen[name] > 1:
            name += f" #{seen[name]}"
        sites.append(Site(kind, name, start, end, replacement))
    return sites


def mutate(source: str, site: Site) -> str:
    mutant = source[: site.start] + site.replacement + source[site.end :]
    return f'#include "plain_atomics.h"\n#line 1\n{mutant}'


def _place(code: str, start: int, end: int) -> str:
    """The source line, or for a line that says little the code line that follows it too."""
    line_start = code.rfind("\n", 0, start) + 1
    line_end = code.find("\n", end)
    lines = code[line_start:].split("\n")
    line = " ".join(code[line_start:line_end].split())
    if line == " ".join(code[start:end].split()):
        following = (" ".join(text.split()) for text in lines[1:])
        line += " before " + next((text for text in following if text), "the end")
    return line
