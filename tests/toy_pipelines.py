"""The three pipelines as small jobs, the order of their progress, and what two runs of one must have in common."""

import hashlib
import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file

import toy_lists
from palate import artifacts
from palate.corpora.worlds import personas
from palate.models.diffusion import load_diffusion
from palate.training.logging import LOG
from toy_captions import mixed
from toy_unihetero import build_parts

JOBS = Path(__file__).resolve().parents[1] / "jobs"
TWO_RANKS = ("--launcher", "ray", "--workers", "2", "--gpu", "False")


@dataclass(frozen=True)
class Pipeline:
    """One of the three.

    ``log``: the folder, below the run's, where its training of ``steps`` logs; ``last``: the artifact that
    ends it. ``preparation``: the job, with its flags, whose tasks Ray Data runs; ``tasks``: three of these in their
    order, by the label of their step and their position in it (-1: any).
    """

    name: str
    script: str
    flags: str
    log: str
    last: str
    steps: int
    preparation: str
    tasks: tuple[tuple[str, int], ...]

    def job(self, inputs: Path, out: str | Path, *more: str) -> list[str]:
        """The command line, from the script on."""
        flags = shlex.split(self.flags.format(inputs=inputs))
        return [str(JOBS / self.script), *flags, "--out", str(out), *more]

    def prepare(self, inputs: Path, out: Path, *more: str) -> list[str]:
        """The command line of the preparation."""
        script, *flags = shlex.split(self.preparation.format(inputs=inputs))
        return [str(JOBS / script), *flags, "--out", str(out), *more]


CARD = Pipeline(
    "card",
    "card.py",
    """--corpus {inputs}/personas --model tiny --clusters 2 --max-prompt-tokens 200 --max-answer-tokens 12 --rank 2
    --epochs 20 --batch 8 --checkpoint-every 5 --people-per-shard 3 --top-k 10 --cluster-texts 0 --other-texts 1
    --width 4 --head-epochs 2 --head-precision 60 --vector-deviation 1""",
    "training/adapters",
    "head",
    60,
    "prepare.py jsonl --input {inputs}/texts/0.jsonl {inputs}/texts/1.jsonl --questions-per-user 1 --buckets 2",
    (("read", 1), ("assign", 0), ("finish", 1)),
)
LPO = Pipeline(
    "lpo",
    "lpo.py",
    """--lists {inputs}/lists --model {inputs}/base --resolution 16 --latent-dtype float32 --encode-batch 32
    --kl-beta 50 --steps 40 --batch 4 --learning-rate 3e-3 --checkpoint-every 5 --sampler-steps 2 --grid 2""",
    "training",
    "tuned",
    40,
    """lpo.py --lists {inputs}/lists --model {inputs}/base --resolution 16 --latent-dtype float32 --encode-batch 32
    --kl-beta 50 --steps 1 --batch 4 --sampler-steps 2 --grid 0""",
    (("encode images", -1), ("encode images", -1), ("encode captions", 0)),
)
UNIHETERO = Pipeline(
    "unihetero",
    "unihetero.py",
    """train --corpus {inputs}/parts/index --language {inputs}/parts/language --vision {inputs}/parts/vision
    --vae {inputs}/parts/vae --arm decoder --cache {inputs}/parts/cache --steps 40 --batch 6 --micro-batch 2
    --checkpoint-every 5""",
    "training",
    "model",
    40,
    "prepare.py captions --input {inputs}/shards/* --group-samples 12",
    (("scan", 2), ("find duplicates", 0), ("publish", 1)),
)
PIPELINES = (CARD, LPO, UNIHETERO)


def build_inputs(folder: Path) -> Path:
    """What the jobs of the three read."""
    personas.prepare(personas.PersonasConfig(out=f"{folder}/personas", people=8, items=6, questions=1))
    toy_lists.lists(folder / "lists")
    load_diffusion("shapes").pipeline.save_pretrained(folder / "base")
    mixed(folder / "shards")
    (folder / "texts").mkdir()
    for half in range(2):
        lines = [
            {"user_id": f"user-{half}-{user}", "input": f"thing {item}", "output": f"{'well ' * user} it is {item}"}
            for user in range(4)
            for item in range(6)
        ]
        (folder / "texts" / f"{half}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (folder / "parts").mkdir()
    build_parts(folder / "parts")
    return folder


def rows(log: str | Path) -> list[dict[str, Any]]:
    """The rows of a log that may be being written: a last line that is not whole yet is left out."""
    filesystem, root = artifacts.locate(log)
    try:
        lines = filesystem.cat_file(f"{root}/{LOG}").decode(errors="replace").split("\n")
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in lines[:-1]]


def last_step(log: str | Path) -> int:
    """The number of the last step that a log has; 0 without any."""
    found = rows(log)
    return found[-1]["step"] if found else 0


def committed(out: str | Path) -> dict[str, artifacts.Artifact]:
    """Every finished artifact below a folder, by its path in it; each is read whole and compared with its manifest."""
    filesystem, root = artifacts.locate(out)
    if not filesystem.exists(root):
        return {}
    found = {}
    for manifest in sorted(filesystem.find(root)):
        if manifest.rpartition("/")[2] == artifacts.MANIFEST:
            place = manifest.removeprefix(f"{root}/").rpartition("/")[0]
            try:
                found[place] = artifacts.open_artifact(artifacts.join(out, place)).verify()
            except artifacts.ArtifactMissing:
                continue  # a manifest that was cut off: nobody reads the folder
    return found


def stages(found: Mapping[str, artifacts.Artifact]) -> dict[str, tuple[str, str]]:
    """Digest and time of what was committed; not of checkpoints, which go when later ones are there."""
    return {place: (one.digest, one.created) for place, one in found.items() if "/checkpoints/" not in place}


def newest(found: Mapping[str, artifacts.Artifact]) -> dict[str, str]:
    """The newest checkpoint of each training."""
    places = sorted(place for place in found if "/checkpoints/" in place)
    return {place.partition("/checkpoints/")[0]: place.rpartition("/")[2] for place in places}


def outcome(pipeline: Pipeline, out: str | Path) -> dict[str, Any]:
    """What two runs of one pipeline have in common to the last bit: the files of its stages, and each step's batch and
    loss."""
    trace = [(row["step"], row["fingerprint"], row["loss"].hex()) for row in rows(artifacts.join(out, pipeline.log))]
    return {"files": contents(out), "trace": trace}


def contents(out: str | Path) -> dict[str, Any]:
    """The files of the finished stages below a folder, but for texts that name the folder."""
    files: dict[str, Any] = {}
    for place, one in committed(out).items():
        if "/checkpoints/" not in place:
            for entry in one.files:
                name = f"{place}/{entry.path}"
                if name.endswith(".safetensors"):  # which orders its metadata by chance
                    files[name] = tensors_of(one.local(entry.path))
                elif name.endswith("/report.json"):  # with how long it took
                    files[name] = {**one.read_json(entry.path), "seconds": None}
                elif not name.endswith(".md"):
                    files[name] = entry.sha256
    return files


def tensors_of(file: Path) -> dict[str, tuple[list[int], str]]:
    """Shape and bytes (SHA-256) of the tensors in a file."""
    return {name: (list(t.shape), hashlib.sha256(t.tobytes()).hexdigest()) for name, t in load_file(file).items()}
