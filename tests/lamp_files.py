"""Writing files in LaMP's shape: not a test, used by the tests of preparation and of its memory."""

import json
import random
from pathlib import Path


def write_large(folder: Path, megabytes: float, seed: int = 0) -> tuple[Path, Path, int]:
    """A LaMP_4 question file of about that size without user ids, its outputs, and how many people wrote it.

    Every person asks two questions that share half of a profile of 200 articles of about 1 KB.
    """
    source = random.Random(seed)
    words = ["".join(source.choices("abcdefghijklmnopqrstuvwxyz", k=source.randint(3, 9))) for _ in range(3000)]
    questions, outputs = folder / "questions.json", folder / "outputs.json"
    golds, people, written = [], 0, 0

    def item(identity: str) -> dict:
        text, title = " ".join(source.choices(words, k=145)), " ".join(source.choices(words, k=7))
        return {"id": identity, "text": text, "title": title}

    with questions.open("w") as stream:
        stream.write("[")
        while written < megabytes * 1e6:
            items = [item(f"{people}-{number}") for number in range(300)]
            for number in range(2):
                article = " ".join(source.choices(words, k=145))
                row = {
                    "id": f"{people}-{number}-question",
                    "input": f"Generate a headline for the following article: {article}",
                    "profile": items[100 * number : 100 * number + 200],
                }
                golds.append({"id": row["id"], "output": " ".join(source.choices(words, k=7))})
                written += stream.write(("" if written == 0 else ",") + json.dumps(row))
            people += 1
        stream.write("]")
    outputs.write_text(json.dumps({"task": "LaMP_4", "golds": golds}))
    return questions, outputs, people
