"""People who come after the training: a vector from their lists, in a finished run with ``--personal examples``.

OUT/tuned   the run's branch with everybody's vectors, old and new: served and evaluated like the run itself
"""

import shutil
from dataclasses import dataclass

import torch

from palate import artifacts
from palate.artifacts import Artifact, ArtifactMismatch, Writer, join
from palate.config import scale
from palate.corpora.schema import RANKED_LISTS
from palate.lpo import personal
from palate.lpo.stages import TUNED
from palate.lpo.taste import TASTE, load_measure, taste_vectors
from palate.models.image_features import image_features


@dataclass(frozen=True, kw_only=True)
class NewcomersConfig:
    """Give people a vector in a finished run, from lists that they ranked."""

    run: str = scale()
    """A run of jobs/lpo.py with --personal examples, or an --out of this command: a folder or URL."""
    lists: str = scale()
    """Lists of these people (jobs/prepare.py rankings --group-by caption-user). All are taken as examples."""
    out: str = scale()
    """Folder or URL of the run with these people added; whoever was there before and is in the lists is replaced."""
    device: str = scale("cpu")
    """Where the features of images are computed."""
    fresh: bool = scale(False)
    """Discard what --out holds."""


def add_people(config: NewcomersConfig) -> Artifact:
    """The run with these people, unless it is there.

    Raises:
        ArtifactMismatch: the run was not made with --personal examples, or --out holds something else.
        ValueError: the lists name no person, or --out is the run itself.
    """
    if artifacts.locate(config.run)[1].rstrip("/") == artifacts.locate(config.out)[1].rstrip("/"):
        raise ValueError(f"--out {config.out} is the run itself, which is not changed: give another folder")
    run = artifacts.open_artifact(join(config.run, "tuned"), TUNED)
    if f"person/{TASTE}" not in run.paths("person/"):
        raise ArtifactMismatch(f"{config.run} has no {TASTE}: people are added to runs with --personal examples")
    lists = artifacts.open_artifact(config.lists, RANKED_LISTS)

    def produce(writer: Writer) -> None:
        before = personal.load_people(run.local_folder("person"))
        features = image_features(run.config["personal"]["features"], config.device)
        found = taste_vectors(lists, None, features, load_measure(run.local_folder("person")))
        vectors = {user: before.embeddings_UJ[place].detach() for user, place in before.places.items()}
        vectors |= dict(zip(found.ids, torch.from_numpy(found.vectors_UD).float(), strict=True))
        for path in run.paths():
            (writer.folder / path).parent.mkdir(exist_ok=True)
            shutil.copy(run.local(path), writer.folder / path)
        ids = sorted(vectors)
        everybody = personal.People(ids, torch.stack([vectors[user] for user in ids]), learned=False)
        personal.save_people(everybody, writer.folder / "person")
        writer.summary.update(people=len(ids), added=len(set(found.ids) - set(before.ids)))

    out, described = join(config.out, "tuned"), dict(run.config)
    inputs = {"run": run, "lists": lists}
    return artifacts.ensure(out, produce, kind=TUNED, config=described, inputs=inputs, fresh=config.fresh)
