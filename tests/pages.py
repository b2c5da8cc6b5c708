"""What the pages say: their fenced blocks, the commands in these, and the folders that the commands make."""

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def fences(text: str) -> list[tuple[str, str]]:
    """Language and content of every fenced block of a Markdown page, in order."""
    return FENCE.findall(text)


def commands(text: str) -> list[list[str]]:
    """Words of every ``python jobs/…`` command in a page's fences, continued lines joined and comments dropped; those
    that are submitted to a cluster, too."""
    found = []
    for _, content in fences(text):
        for line in content.replace("\\\n", " ").splitlines():
            command = re.match(r"(?:ray job submit .*? -- )?(python (?:jobs|serve|tune|benchmarks)/.*)", line.strip())
            if command:
                found.append(shlex.split(command.group(1), comments=True))
    return found


def outputs(text: str) -> set[str]:
    """What ``--out`` names in a page, in fences and in its sentences; not URLs, nor words such as RUN that stand for a
    folder of the reader's."""
    named = set(re.findall(r"--out[ =]([\w./-]+)(?!\S*://)", text))
    return {name for name in named if not re.fullmatch(r"[A-Z0-9]+(/.*)?", name) and not name.startswith(("s3", "/"))}
