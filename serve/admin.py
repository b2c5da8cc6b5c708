"""Administration of a text server's database: API keys and runs. Replicas see changes within a second.

python serve/admin.py key-create --database sqlite:///runs/palate.db --tenant acme
python serve/admin.py run-promote --database sqlite:///runs/palate.db --name card-2
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import subcommand

from palate import config as configs
from palate.artifacts import ArtifactError
from palate.card.runs import open_run
from palate.serving.service import default_name
from palate.users import keys, runs
from palate.users.images import RankedImages
from palate.users.store import Store, open_store


@dataclass(frozen=True, kw_only=True)
class _Command:
    database: str
    """URL of the user store."""


@dataclass(frozen=True, kw_only=True)
class KeyCreate(_Command):
    """Print a new API key; it is shown once."""

    tenant: str
    """Whose people the key may see."""
    name: str = "unnamed"
    """What the key is for."""


@dataclass(frozen=True, kw_only=True)
class KeyList(_Command):
    """All keys, without their secrets."""


@dataclass(frozen=True, kw_only=True)
class KeyRevoke(_Command):
    """End a key for good."""

    id: str
    """The key's id, as key-list shows it."""


@dataclass(frozen=True, kw_only=True)
class RunAdd(_Command):
    """Have replicas load a run and serve it by name, beside the live one."""

    run: str
    """Folder or URL of the run."""
    name: str | None = None
    """Its name for clients; by default the last part of --run."""


@dataclass(frozen=True, kw_only=True)
class RunPromote(_Command):
    """Fit everybody to a run's head in the background, then make it the live one."""

    name: str
    """Name of the run."""
    now: bool = False
    """Go live at once; people are answered as new ones until they are fitted."""


@dataclass(frozen=True, kw_only=True)
class RunRollBack(_Command):
    """Return to the run that was live before."""


@dataclass(frozen=True, kw_only=True)
class RunList(_Command):
    """All runs and their states."""


@dataclass(frozen=True, kw_only=True)
class RunRemove(_Command):
    """Forget a run that is not live, with the vectors that were fitted to it."""

    name: str
    """Name of the run."""


@dataclass(frozen=True, kw_only=True)
class PersonImport(_Command):
    """Put an exported person in the place of what is kept under this id, however large: a server's /import takes no
    more than its max_body_bytes."""

    tenant: str
    """Whose person it becomes."""
    file: str
    """What GET /v1/users/{id}/export answered."""


@dataclass(frozen=True, kw_only=True)
class Compact(_Command):
    """Rewrite the database without what was deleted: SQLite may keep copies of rows that it moved. For quiet hours."""


@dataclass(frozen=True, kw_only=True)
class ImagesRemove(_Command):
    """Remove images whose rankings were deleted, where no image server runs that does so by itself."""

    images: str
    """What the image server's setting `feedback` names: a folder or URL."""


Command = (
    Annotated[KeyCreate, subcommand("key-create")]
    | Annotated[KeyList, subcommand("key-list")]
    | Annotated[KeyRevoke, subcommand("key-revoke")]
    | Annotated[RunAdd, subcommand("run-add")]
    | Annotated[RunPromote, subcommand("run-promote")]
    | Annotated[RunRollBack, subcommand("run-roll-back")]
    | Annotated[RunList, subcommand("run-list")]
    | Annotated[RunRemove, subcommand("run-remove")]
    | Annotated[PersonImport, subcommand("person-import")]
    | Annotated[Compact, subcommand("compact")]
    | Annotated[ImagesRemove, subcommand("images-remove")]
)


def key_create(store: Store, command: KeyCreate) -> None:
    print(keys.create_key(store, command.tenant, command.name))


def key_list(store: Store, command: KeyList) -> None:
    for key in keys.list_keys(store):
        print(f"{key.id}  {key.tenant}  {key.name}  {'revoked' if key.revoked else 'valid'}")


def key_revoke(store: Store, command: KeyRevoke) -> None:
    if not keys.revoke(store, command.id):
        raise ValueError(f"--id {command.id}: there is no valid key with this id; key-list shows them")


def run_add(store: Store, command: RunAdd) -> None:
    run = open_run(command.run)
    _show(runs.add_run(store, command.name or default_name(command.run), command.run, run.version, run.model))


def run_promote(store: Store, command: RunPromote) -> None:
    _show(runs.promote(store, command.name) if command.now else runs.start_refit(store, command.name))


def run_roll_back(store: Store, command: RunRollBack) -> None:
    _show(runs.roll_back(store))


def run_list(store: Store, command: RunList) -> None:
    for run in runs.runs(store):
        _show(run)
        print(f"  people to fit: {store.stale(run.head)}")


def run_remove(store: Store, command: RunRemove) -> None:
    found = next((run for run in runs.runs(store) if run.name == command.name), None)
    runs.remove_run(store, command.name)
    if found is not None and all(run.head != found.head for run in runs.runs(store)):
        print(f"{store.drop_head(found.head)} vectors removed")


def person_import(store: Store, command: PersonImport) -> None:
    exported = json.loads(Path(command.file).read_bytes())
    if not isinstance(exported, dict):
        raise ValueError(f"--file {command.file} holds no exported person: give what GET /v1/users/ID/export answered")
    person = store.restore(command.tenant, exported)
    print(f"{person.user_id}: {person.count} texts")


def compact(store: Store, command: Compact) -> None:
    store.compact()


def images_remove(store: Store, command: ImagesRemove) -> None:
    while store.remove_images(RankedImages(command.images).remove):
        pass


def _show(run: runs.Run) -> None:
    print("  ".join(f"{name}={value}" for name, value in asdict(run).items() if value is not None))


DO: dict[type, Callable[[Store, Any], None]] = {
    KeyCreate: key_create,
    KeyList: key_list,
    KeyRevoke: key_revoke,
    RunAdd: run_add,
    RunPromote: run_promote,
    RunRollBack: run_roll_back,
    RunList: run_list,
    RunRemove: run_remove,
    PersonImport: person_import,
    Compact: compact,
    ImagesRemove: images_remove,
}


def main() -> None:
    command = configs.parse(Command, __doc__)
    try:
        with open_store(command.database, patient=True) as store:
            DO[type(command)](store, command)
    except (ArtifactError, ValueError, OSError) as error:
        raise SystemExit(f"admin: {error}") from None


if __name__ == "__main__":
    main()
