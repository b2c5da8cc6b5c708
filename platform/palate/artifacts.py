"""Finished folders and their manifests: how every stage hands its result to the next.

An artifact is a folder whose ``manifest.json`` is written last. Without a readable manifest no reader sees the
folder, and the next writer cleans it. No rename is relied on, so the same holds on a local disk and on object storage
(which must list what was written at once, as S3 has done since 2020). Running a finished stage again does nothing; a
changed identity field or input is refused by name. Where object storage is: docs/storage.md.

On retry: a stage killed at any point either left a complete artifact or one that the next ``ensure`` starts anew.
From a writer's start to its manifest, and while being discarded, a folder holds a marker file: all that lies beside
it is Palate's to delete. A finished folder is discarded only if it holds nothing but what its manifest names.
Two writers of one folder at the same time are not supported: give each run its own folder.
"""

import hashlib
import json
import os
import re
import shutil
import subprocess
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any

import fsspec
from safetensors import SafetensorError

from palate import __version__
from palate import config as configs

MANIFEST = "manifest.json"
MARKER = ".palate-unfinished"  # says that the files beside it are ours to clean, not the user's
_MARKER_TEXT = b"Palate is writing or deleting this folder. Keep nothing of yours here: the next run empties it.\n"

fsspec.register_implementation("s3", "palate.s3.S3", clobber=True)  # imported when it is needed

# Called with the name of each fault point, in order: "before data", "after data", "before manifest", "after manifest".
# Tests replace it to kill the process there.
fault_hook: Callable[[str], None] = lambda point: None  # noqa: E731


class ArtifactError(Exception):
    """Base of what can be wrong with a folder; the message says what was found and what to change."""


class ArtifactMissing(ArtifactError):
    """There is no finished artifact at this place."""


class ArtifactMismatch(ArtifactError):
    """A finished artifact is there, but it was made from another configuration or other inputs."""


class ArtifactCorrupt(ArtifactError):
    """A file named by the manifest is absent or has other bytes."""


@dataclass(frozen=True)
class FileEntry:
    """One file of an artifact: path relative to the folder, size in bytes, SHA-256 in hex."""

    path: str
    size: int
    sha256: str

    def __post_init__(self) -> None:
        # A manifest may come from someone else: its paths must not lead out of the folder, nor out of the cache.
        parts = PurePosixPath(self.path).parts
        if not parts or parts[0] == "/" or ".." in parts or "\\" in self.path or "\n" in self.path:
            raise ValueError(f"{self.path!r} is not a path inside an artifact")


@dataclass(frozen=True)
class Artifact:
    """A finished folder, as its manifest describes it.

    ``identity`` holds the config fields that decide reuse, ``config`` all of them; ``inputs`` maps a role
    ("corpus", "clusters") to the digest of the artifact that was read; ``summary`` is what the stage reports.
    """

    url: str
    kind: str
    config: dict[str, Any]
    identity: dict[str, Any]
    inputs: dict[str, str]
    files: tuple[FileEntry, ...]
    summary: dict[str, Any] = field(default_factory=dict)
    code_version: str = ""
    created: str = ""

    @property
    def digest(self) -> str:
        """SHA-256 over the paths and contents of the files: equal folders have equal digests wherever they lie."""
        lines = "".join(f"{entry.sha256} {entry.path}\n" for entry in sorted(self.files, key=lambda e: e.path))
        return hashlib.sha256(lines.encode()).hexdigest()

    def paths(self, prefix: str = "", suffix: str = "") -> list[str]:
        """Relative paths of the files that start with ``prefix`` and end with ``suffix``, sorted."""
        return sorted(e.path for e in self.files if e.path.startswith(prefix) and e.path.endswith(suffix))

    def local(self, path: str) -> Path:
        """A local file with the content of ``path``: itself on a local disk, else a verified copy in the cache."""
        entry = next((e for e in self.files if e.path == path), None)
        if entry is None:
            raise ArtifactMissing(f"{self.url} ({self.kind}) has no file {path!r}; it has {self.paths()[:20]}")
        filesystem, root = locate(self.url)
        if is_local(filesystem):
            return Path(root) / path
        copy = cache_folder() / "artifacts" / self.digest / path
        if not copy.exists() or copy.stat().st_size != entry.size:
            copy.parent.mkdir(parents=True, exist_ok=True)
            # Others may fetch the same file at once: each writes its own and the last replaces, all with equal bytes.
            partial = copy.with_name(f".{uuid.uuid4().hex}")
            try:
                filesystem.get_file(f"{root}/{path}", str(partial))
                if file_entry(partial, path) != entry:
                    raise ArtifactCorrupt(f"{self.url}/{path} does not have the bytes that its manifest states")
                partial.replace(copy)
            finally:
                partial.unlink(missing_ok=True)
        return copy

    def local_folder(self, prefix: str = "") -> Path:
        """A local folder with every file under ``prefix``, for libraries that load from folders."""
        inside = self.paths(f"{prefix}/" if prefix else "")
        if prefix and not inside:
            raise ArtifactMissing(f"{self.url} ({self.kind}) has no folder {prefix!r}; it has {self.paths()[:20]}")
        filesystem, root = locate(self.url)
        if is_local(filesystem):
            return Path(root) / prefix
        for path in inside:
            self.local(path)
        return cache_folder() / "artifacts" / self.digest / prefix

    def read_json(self, path: str) -> Any:
        return json.loads(self.local(path).read_text())

    def verify(self) -> "Artifact":
        """Hash every file and compare with the manifest.

        Raises:
            ArtifactCorrupt: naming the first file that differs.
        """
        filesystem, root = locate(self.url)
        for entry in self.files:
            try:
                found = _read_entry(filesystem, root, entry.path)
            except FileNotFoundError:
                raise ArtifactCorrupt(f"{self.url}/{entry.path} is gone, though its manifest names it") from None
            if found != entry:
                raise ArtifactCorrupt(
                    f"{self.url}/{entry.path} is corrupt: the manifest states {entry.size} bytes, "
                    f"sha256 {entry.sha256[:12]}…, found {found.size} bytes, {found.sha256[:12]}…. "
                    "Remove the folder, or pass --fresh, to make it again"
                )
        return self


@dataclass
class Writer:
    """An artifact being written: put files under ``folder``; whatever lies there at the end belongs to the artifact.

    On a local disk ``folder`` is the artifact itself; for a URL it is a temporary folder that is uploaded at the end.
    Distributed writers may also write under ``url`` directly; such files are hashed by reading them back.
    """

    url: str
    folder: Path
    summary: dict[str, Any] = field(default_factory=dict)

    def write_json(self, path: str, value: Any) -> None:
        target = self.folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


def locate(url: str | Path) -> tuple[Any, str]:
    """The fsspec filesystem of a path or URL and the path inside it."""
    local = fsspec.utils.get_protocol(str(url)) in ("file", "local")
    # Listings must be fresh: another process may have finished the artifact a moment ago.
    filesystem, path = fsspec.core.url_to_fs(str(url), **({} if local else {"use_listings_cache": False}))
    return filesystem, path.rstrip("/")


def is_local(filesystem: Any) -> bool:
    return "file" in (filesystem.protocol if isinstance(filesystem.protocol, tuple) else (filesystem.protocol,))


def join(url: str | Path, *parts: str) -> str:
    """``url`` extended by path parts, for local paths and URLs alike."""
    return "/".join([str(url).rstrip("/"), *parts])


def folders(url: str | Path) -> list[str]:
    """URLs of the folders directly inside ``url``, sorted; none where it does not exist."""
    filesystem, root = locate(url)
    found = filesystem.ls(root, detail=True) if filesystem.isdir(root) else []
    return sorted(
        join(url, entry["name"].rstrip("/").rpartition("/")[2]) for entry in found if entry["type"] == "directory"
    )


def cache_folder() -> Path:
    """Where fetched and converted files are kept: $PALATE_CACHE, or palate under the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "palate"
    return Path(os.environ.get("PALATE_CACHE", default))


def exists(url: str | Path) -> bool:
    """Whether a finished artifact is there."""
    try:
        open_artifact(url)
    except ArtifactMissing:
        return False
    return True


def open_artifact(url: str | Path, kind: str | None = None) -> Artifact:
    """The finished artifact at ``url``.

    Raises:
        ArtifactMissing: no manifest, or one that was cut off while being written.
        ArtifactMismatch: it is of another kind than the caller can read.
        ArtifactCorrupt: a file is absent or has another size (contents: ``Artifact.verify``).
    """
    filesystem, root = locate(url)
    artifact = _read_manifest(filesystem, root, url)
    if kind is not None and artifact.kind != kind:
        raise ArtifactMismatch(f"{url} holds a {artifact.kind!r} artifact, expected {kind!r}: check the path")
    sizes = _sizes(filesystem, root)
    for entry in artifact.files:
        if sizes.get(entry.path) != entry.size:
            raise ArtifactCorrupt(
                f"{url}/{entry.path} should have {entry.size} bytes, found {sizes.get(entry.path, 'no file')}. "
                "Remove the folder, or pass --fresh, to make it again"
            )
    return artifact


def model_source(name: str) -> str:
    """What libraries load a model called ``name`` from: itself, or for a URL a checked local copy of what lies there, a
    finished artifact or a folder of one.

    Raises:
        ArtifactMissing: there is no such folder, or it is of no artifact.
    """
    if "://" not in name:
        return name
    steps = name.rstrip("/").split("/")
    for cut in range(len(steps), 2, -1):  # from the folder itself up to the bucket
        try:
            found = open_artifact("/".join(steps[:cut]))
        except ArtifactMissing:
            continue
        return str(found.local_folder("/".join(steps[cut:])))
    raise ArtifactMissing(
        f"{name} is no folder of a finished artifact, whose files could be checked: name a model in a run or in parts "
        "of Palate's, a hub id, or a folder on this machine"
    )


def ensure(
    url: str | Path,
    produce: Callable[[Writer], None],
    *,
    kind: str,
    config: Any,
    inputs: Mapping[str, Artifact] | None = None,
    fresh: bool = False,
) -> Artifact:
    """The artifact at ``url``, made by ``produce`` unless it is already there.

    Args:
        produce: writes the files; called with a clean folder.
        config: a config dataclass (see ``palate.config``); its identity fields decide whether it is reused.
        inputs: the artifacts that ``produce`` reads, by role.
        fresh: discard what is there, finished or not.

    Raises:
        ArtifactMismatch: something else is there; the message names the field or the input that differs.
    """
    with writing(url, kind=kind, config=config, inputs=inputs, fresh=fresh) as writer:
        if writer is not None:
            produce(writer)
    return open_artifact(url, kind)


def finished(
    url: str | Path, *, kind: str, config: Any, inputs: Mapping[str, Artifact] | None = None
) -> Artifact | None:
    """The artifact at ``url`` if it is there and was made from this config and these inputs; None if it is not there.

    Raises:
        ArtifactMismatch: something else is there; the message names the field or the input that differs.
    """
    try:
        found = open_artifact(url)
    except ArtifactMissing:
        return None
    _require_same(found, kind, configs.identity(config), _digests(inputs))
    return found


@contextmanager
def writing(
    url: str | Path,
    *,
    kind: str,
    config: Any,
    inputs: Mapping[str, Artifact] | None = None,
    fresh: bool = False,
) -> Iterator[Writer | None]:
    """Like ``ensure``, as a context: yields None when the artifact is already there, else a writer to fill.

    An exception inside the context leaves the folder unfinished, to be cleaned by the next writer.
    """
    if fresh:
        discard(url)
    filesystem, root = locate(url)
    if finished(url, kind=kind, config=config, inputs=inputs) is not None:
        if filesystem.exists(f"{root}/{MARKER}"):  # its writer was killed one step before the end
            filesystem.rm_file(f"{root}/{MARKER}")
        yield None
        return

    discard(url)
    local = is_local(filesystem)
    if local:
        Path(root).mkdir(parents=True, exist_ok=True)
    _write(filesystem, root, MARKER, _MARKER_TEXT)
    fault_hook("before data")
    with tempfile.TemporaryDirectory(prefix="palate-") as temporary:
        writer = Writer(url=_absolute(url), folder=Path(root if local else temporary))
        with os_errors():
            yield writer
        fault_hook("after data")
        entries = _publish(writer.folder, filesystem, root, local)
    fault_hook("before manifest")
    manifest = {
        "kind": kind,
        "config": configs.to_dict(config),
        "identity": configs.identity(config),
        "inputs": _digests(inputs),
        "files": [asdict(entry) for entry in entries],
        "summary": writer.summary,
        "code_version": code_version(),
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    _write(filesystem, root, MANIFEST, json.dumps(manifest, indent=1, sort_keys=True).encode())
    fault_hook("after manifest")
    filesystem.rm_file(f"{root}/{MARKER}")


@contextmanager
def os_errors() -> Iterator[None]:
    """Let what a disk or object storage refuses be an ``OSError``: safetensors and botocore have their own."""
    try:
        yield
    except SafetensorError as error:
        if found := re.search(r"\(os error (\d+)\)", str(error)):
            number = int(found.group(1))
            raise OSError(number, os.strerror(number)) from error
        raise
    except Exception as error:
        if type(error).__module__.startswith("botocore."):
            away = {kind.__name__ for kind in type(error).__mro__} & {"ConnectionError", "HTTPClientError"}
            then = "; the same command goes on when it is there again" if away else ""
            raise OSError(f"object storage failed: {str(error).rstrip('.')}{then}") from error
        raise


def discard(url: str | Path) -> None:
    """Remove an artifact, finished or not: the manifest first, so that no reader sees a part of it.

    Raises:
        ArtifactMismatch: the folder holds files that no artifact writer put there; nothing has been deleted.
    """
    filesystem, root = locate(url)
    present = _sizes(filesystem, root)
    if not present:
        return
    try:
        named = {entry.path for entry in _read_manifest(filesystem, root, url).files} | {MANIFEST, MARKER}
    except ArtifactMissing:
        named = set(present) if MARKER in present else set()
    if foreign := sorted(present.keys() - named):
        raise ArtifactMismatch(
            f"{url} holds files that Palate did not write (such as {foreign[0]!r}): "
            "move them away, or choose an empty or new folder"
        )
    if MARKER not in present:
        # Whoever is killed between here and the end leaves a folder that is still known to be ours.
        _write(filesystem, root, MARKER, _MARKER_TEXT)
    if MANIFEST in present:
        filesystem.rm_file(f"{root}/{MANIFEST}")
        _make_durable(filesystem, root)
    for path in sorted(present.keys() - {MANIFEST, MARKER}):
        filesystem.rm_file(f"{root}/{path}")
    if is_local(filesystem):
        for folder, _, _ in os.walk(root, topdown=False):
            if folder != root:
                Path(folder).rmdir()
        _make_durable(filesystem, root)
    filesystem.rm_file(f"{root}/{MARKER}")


def file_entry(file: Path, path: str) -> FileEntry:
    """The entry of a local file that will be called ``path`` inside its artifact."""
    with file.open("rb") as stream:
        return FileEntry(path, file.stat().st_size, hashlib.file_digest(stream, "sha256").hexdigest())


@cache
def code_version() -> str:
    """The package's version, and the commit when it runs from a git checkout."""
    checkout = Path(__file__).resolve().parents[2]
    if not (checkout / ".git").exists() or shutil.which("git") is None:
        return __version__
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--abbrev=12"]
    described = subprocess.run(command, capture_output=True, text=True, check=False)
    return f"{__version__}+{described.stdout.strip()}" if described.returncode == 0 else __version__


def _digests(inputs: Mapping[str, Artifact] | None) -> dict[str, str]:
    return {role: artifact.digest for role, artifact in (inputs or {}).items()}


def _require_same(found: Artifact, kind: str, identity: Mapping[str, Any], inputs: Mapping[str, str]) -> None:
    if found.kind != kind:
        raise ArtifactMismatch(f"{found.url} holds a {found.kind!r} artifact, expected {kind!r}: choose another folder")
    differences = [
        *_differences(found.identity, json.loads(json.dumps(identity)), "config field"),
        *_differences(found.inputs, inputs, "input"),
    ]
    if differences:
        raise ArtifactMismatch(
            f"{found.url} was made differently: {'; '.join(differences)}. "
            "Use another folder, restore the value, or pass --fresh to discard it"
        )


def _differences(old: Mapping[str, Any], new: Mapping[str, Any], what: str) -> Iterable[str]:
    for name in sorted(old.keys() | new.keys()):
        before, now = old.get(name, "absent"), new.get(name, "absent")
        if isinstance(before, dict) and isinstance(now, dict):
            yield from (text.replace("'", f"'{name}.", 1) for text in _differences(before, now, what))
        elif before != now:
            yield f"{what} '{name}' was {_short(before)}, is now {_short(now)}"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


def _read_manifest(filesystem: Any, root: str, url: str | Path) -> Artifact:
    try:
        content = filesystem.cat_file(f"{root}/{MANIFEST}")
    except (FileNotFoundError, NotADirectoryError):
        raise ArtifactMissing(
            f"no finished artifact at {url}: there is no {MANIFEST}. Run the stage that makes it"
        ) from None
    try:
        manifest = json.loads(content)
        files = tuple(FileEntry(**entry) for entry in manifest.pop("files"))
        return Artifact(url=_absolute(url), files=files, **manifest)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ArtifactMissing(
            f"no finished artifact at {url}: its {MANIFEST} was cut off, or is not Palate's ({error}). "
            "Run the stage again, or check the path"
        ) from None


def _absolute(url: str | Path) -> str:
    """``url`` as it means the same in another working directory."""
    filesystem, root = locate(url)
    return root if is_local(filesystem) else str(url)


def _sizes(filesystem: Any, root: str) -> dict[str, int]:
    """Size in bytes of every file below ``root``, by relative path."""
    prefix = f"{root}/"
    # Consoles of object stores represent an empty folder by an empty object called "folder/".
    found = {path: info for path, info in filesystem.find(root, detail=True).items() if not path.endswith("/")}
    return {path.removeprefix(prefix): info["size"] for path, info in found.items()}


def _publish(folder: Path, filesystem: Any, root: str, local: bool) -> list[FileEntry]:
    """Make every written file durable at its final place; returns their entries."""
    if (folder / MANIFEST).exists():
        raise ArtifactError(f"a stage wrote {MANIFEST} into {folder}: that name is the manifest's, choose another")
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p != folder / MARKER)
    entries = [file_entry(file, file.relative_to(folder).as_posix()) for file in files]
    if local:
        for path in [*files, *(p for p in folder.rglob("*") if p.is_dir()), folder]:
            _sync(path)
        return entries
    for file, entry in zip(files, entries, strict=True):
        filesystem.put_file(str(file), f"{root}/{entry.path}")
    written = {entry.path for entry in entries}
    others = _sizes(filesystem, root).keys() - written - {MARKER, MANIFEST}
    return entries + [_read_entry(filesystem, root, path) for path in sorted(others)]


def _read_entry(filesystem: Any, root: str, path: str) -> FileEntry:
    digest, size = hashlib.sha256(), 0
    with filesystem.open(f"{root}/{path}", "rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
            size += len(chunk)
    return FileEntry(path, size, digest.hexdigest())


def _write(filesystem: Any, root: str, name: str, content: bytes) -> None:
    """Write a file directly in the artifact's folder; it is durable, and so is all before it, when this returns."""
    filesystem.pipe_file(f"{root}/{name}", content)
    if is_local(filesystem):
        _sync(Path(root) / name)
    _make_durable(filesystem, root)


def _make_durable(filesystem: Any, root: str) -> None:
    """On a local disk, put what was created and removed in the folder on the disk. Object stores do by themselves."""
    if is_local(filesystem):
        _sync(Path(root))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
