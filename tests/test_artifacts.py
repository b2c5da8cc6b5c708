"""Artifacts: whole or unseen, whatever is killed and wherever they lie; nothing of the user's is deleted."""

import dataclasses
import errno
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from cut_uploads import Proxy
from palate import artifacts
from palate.config import scale


@dataclasses.dataclass(frozen=True)
class Optimizer:
    learning_rate: float = 0.1
    fused: bool = scale(False)


@dataclasses.dataclass(frozen=True)
class Config:
    clusters: int = 4
    targets: tuple[str, ...] = ("q", "v")
    optimizer: Optimizer = Optimizer()
    workers: int = scale(1)


def produce(writer: artifacts.Writer) -> None:
    writer.write_json("report.json", {"größe": 1})
    (writer.folder / "deep/er").mkdir(parents=True)
    (writer.folder / "deep/er/data.bin").write_bytes(bytes(range(256)))
    (writer.folder / "empty.bin").touch()
    writer.summary["rows"] = 3


def refuse(writer: artifacts.Writer) -> None:
    raise AssertionError("a finished artifact was made again")


def make(url: object, config: object = None, **keywords: object) -> artifacts.Artifact:
    keywords = {"kind": "sample", "config": config or Config(), **keywords}
    return artifacts.ensure(str(url), keywords.pop("produce", produce), **keywords)  # type: ignore[arg-type]


def listing(url: str) -> set[str]:
    filesystem, root = artifacts.locate(url)
    return {path.removeprefix(f"{root}/") for path in filesystem.find(root)}


# Writing, reading, reusing


def test_what_is_written_is_read_back_and_listed(any_url):
    made = make(any_url)
    found = artifacts.open_artifact(any_url, "sample")
    assert found == made
    assert found.verify() is found
    assert found.paths() == ["deep/er/data.bin", "empty.bin", "report.json"]
    assert found.paths("deep/", ".bin") == ["deep/er/data.bin"]
    assert found.read_json("report.json") == {"größe": 1}
    assert found.local("deep/er/data.bin").read_bytes() == bytes(range(256))
    assert found.local("empty.bin").read_bytes() == b""
    assert (found.local_folder("deep") / "er" / "data.bin").exists()
    assert (found.local_folder() / "report.json").exists()
    assert found.summary == {"rows": 3}
    assert found.config["workers"] == 1
    assert "workers" not in found.identity
    assert listing(any_url) == {*found.paths(), artifacts.MANIFEST}


def test_a_finished_artifact_is_not_made_again_and_scale_fields_do_not_matter(any_url):
    first = make(any_url)
    other = Config(workers=8, optimizer=Optimizer(fused=True))
    assert make(any_url, other, produce=refuse) == first


@pytest.mark.parametrize(
    ("changed", "name"),
    [
        (Config(clusters=5), r"config field 'clusters' was 4, is now 5"),
        (Config(targets=("q",)), r"config field 'targets'"),
        (Config(optimizer=Optimizer(learning_rate=0.2)), r"config field 'optimizer\.learning_rate' was 0\.1"),
    ],
)
def test_a_changed_identity_field_is_refused_by_name(tmp_path, changed, name):
    make(tmp_path / "a")
    with pytest.raises(artifacts.ArtifactMismatch, match=name):
        make(tmp_path / "a", changed, produce=refuse)


def test_a_changed_input_is_refused_by_role_but_a_moved_one_is_not(tmp_path):
    corpus, copy = make(tmp_path / "corpus"), make(tmp_path / "copy", Config(workers=3))
    make(tmp_path / "out", inputs={"corpus": corpus})
    make(tmp_path / "out", inputs={"corpus": copy}, produce=refuse)  # equal content elsewhere
    other = make(tmp_path / "other", produce=lambda writer: writer.write_json("x.json", 1))
    with pytest.raises(artifacts.ArtifactMismatch, match="input 'corpus'"):
        make(tmp_path / "out", inputs={"corpus": other}, produce=refuse)
    with pytest.raises(artifacts.ArtifactMismatch, match=r"input 'corpus' was .*, is now \"absent\""):
        make(tmp_path / "out", produce=refuse)


def test_another_kind_is_refused(tmp_path):
    make(tmp_path / "a")
    with pytest.raises(artifacts.ArtifactMismatch, match="'sample' artifact, expected 'model'"):
        artifacts.open_artifact(tmp_path / "a", "model")
    with pytest.raises(artifacts.ArtifactMismatch, match="choose another folder"):
        make(tmp_path / "a", kind="model", produce=refuse)


def test_fresh_makes_it_again_without_the_old_files(any_url):
    make(any_url)
    again = make(any_url, Config(clusters=9), fresh=True, produce=lambda writer: writer.write_json("only.json", 1))
    assert again.paths() == ["only.json"]
    assert listing(any_url) == {"only.json", artifacts.MANIFEST}


def test_an_exception_while_writing_leaves_nothing_to_see_and_the_next_writer_cleans(any_url):
    def fail(writer: artifacts.Writer) -> None:
        writer.write_json("half.json", 1)
        raise RuntimeError("out of disk")

    with pytest.raises(RuntimeError, match="out of disk"):
        make(any_url, produce=fail)
    assert not artifacts.exists(any_url)
    assert make(any_url).paths() == ["deep/er/data.bin", "empty.bin", "report.json"]
    assert "half.json" not in listing(any_url)


def test_a_relative_path_means_the_same_after_a_change_of_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = make("a")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert made.read_json("report.json") == {"größe": 1}


def test_the_digest_depends_on_contents_and_names_only(tmp_path):
    assert make(tmp_path / "a").digest == make(tmp_path / "b", Config(clusters=7)).digest
    renamed = make(tmp_path / "c", produce=lambda writer: writer.write_json("renamed.json", {"größe": 1}))
    original = make(tmp_path / "d", produce=lambda writer: writer.write_json("report.json", {"größe": 1}))
    assert renamed.digest != original.digest


def test_files_written_under_the_url_by_others_belong_to_the_artifact(s3_url):
    """As Ray Data's writers do: straight to object storage, not through the writer's folder."""
    url = f"{s3_url}/deep/run"

    def distributed(writer: artifacts.Writer) -> None:
        filesystem, root = artifacts.locate(writer.url)
        filesystem.pipe_file(f"{root}/part-0.parquet", b"rows")
        writer.write_json("report.json", 1)

    made = make(url, produce=distributed)
    assert made.verify().paths() == ["part-0.parquet", "report.json"]
    assert made.local("part-0.parquet").read_bytes() == b"rows"


def test_local_and_object_storage_agree_on_the_digest(tmp_path, s3_url):
    assert make(tmp_path / "a").digest == make(f"{s3_url}/a").digest


def test_an_upload_does_not_wait_for_leave_that_may_never_come(s3_url, s3_endpoint, tmp_path, monkeypatch):
    """tests/chaos has the server that never answers."""
    with Proxy(s3_endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        artifacts.locate(s3_url)[0].clear_instance_cache()
        filesystem, bucket = artifacts.locate(s3_url)
        (tmp_path / "file").write_bytes(b"x" * 1000)
        filesystem.put_file(str(tmp_path / "file"), f"{bucket}/file")
        filesystem.pipe_file(f"{bucket}/other", b"y" * 1000)
        assert (proxy.uploads, proxy.waiting) == (2, 0)
        filesystem.connect(refresh=True)
        filesystem.pipe_file(f"{bucket}/third", b"z" * 1000)
        assert (proxy.uploads, proxy.waiting) == (3, 0)
    filesystem.clear_instance_cache()


@pytest.mark.slow
def test_a_file_large_enough_for_a_multipart_upload(s3_url):
    block = os.urandom(1 << 20)

    def large(writer: artifacts.Writer) -> None:
        with (writer.folder / "large.bin").open("wb") as stream:
            for _ in range(110):
                stream.write(block)

    made = make(f"{s3_url}/large", produce=large)
    assert made.verify().files[0].size == 110 << 20
    assert made.local("large.bin").stat().st_size == 110 << 20


# Nothing of the user's is deleted


def put(url: str, path: str, content: bytes = b"mine") -> None:
    filesystem, root = artifacts.locate(url)
    if artifacts.is_local(filesystem):
        (Path(root) / path).parent.mkdir(parents=True, exist_ok=True)
    filesystem.pipe_file(f"{root}/{path}", content)


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("name", ["notes.txt", "sub/notes.txt", artifacts.MANIFEST])
def test_a_folder_with_files_of_the_users_is_refused_and_left_as_it_was(any_url, name, fresh):
    put(any_url, name, b'{"name": "a web app", "icons": []}')
    with pytest.raises(artifacts.ArtifactMismatch, match="did not write"):
        make(any_url, fresh=fresh)
    assert listing(any_url) == {name}


def test_a_users_file_inside_a_finished_artifact_keeps_it_from_being_discarded(any_url):
    made = make(any_url)
    put(any_url, "deep/notes.txt")
    with pytest.raises(artifacts.ArtifactMismatch, match=r"deep/notes\.txt"):
        make(any_url, Config(clusters=5), fresh=True)
    assert artifacts.open_artifact(any_url).verify() == made
    assert "deep/notes.txt" in listing(any_url)


def test_neighbours_with_the_same_beginning_are_untouched(any_url):
    put(any_url, "run2/notes.txt")
    make(f"{any_url}/run")
    make(f"{any_url}/run", fresh=True)
    artifacts.discard(f"{any_url}/run")
    assert listing(any_url) == {"run2/notes.txt"}


def test_a_link_out_of_an_unfinished_folder_is_removed_but_not_followed(tmp_path):
    put(str(tmp_path / "user"), "notes.txt")
    put(str(tmp_path / "run"), artifacts.MARKER)
    (tmp_path / "run" / "link").symlink_to(tmp_path / "user")
    make(tmp_path / "run")
    assert (tmp_path / "user" / "notes.txt").read_bytes() == b"mine"


def test_a_path_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises((artifacts.ArtifactError, OSError)):
        make(tmp_path / "file", fresh=True)
    assert (tmp_path / "file").read_text() == "mine"


def test_an_empty_folder_made_in_a_consoles_object_store_can_be_used(s3_url):
    put(s3_url, "run/", b"")
    assert make(f"{s3_url}/run").verify().paths() == ["deep/er/data.bin", "empty.bin", "report.json"]


def test_discarding_what_is_not_there_does_nothing(any_url):
    artifacts.discard(f"{any_url}/none")
    assert not artifacts.exists(f"{any_url}/none")


# Corruption


def test_a_missing_or_cut_file_is_corrupt_by_name_and_fresh_makes_it_again(any_url):
    make(any_url)
    put(any_url, "deep/er/data.bin", b"cut")
    with pytest.raises(artifacts.ArtifactCorrupt, match=r"data\.bin should have 256 bytes, found 3"):
        artifacts.open_artifact(any_url)
    with pytest.raises(artifacts.ArtifactCorrupt, match="--fresh"):
        make(any_url)
    filesystem, root = artifacts.locate(any_url)
    filesystem.rm_file(f"{root}/deep/er/data.bin")
    with pytest.raises(artifacts.ArtifactCorrupt, match="found no file"):
        artifacts.open_artifact(any_url)
    assert make(any_url, fresh=True).verify()


def test_changed_bytes_of_the_same_length_are_found_by_verify_and_when_fetched(any_url):
    made = make(any_url)
    put(any_url, "deep/er/data.bin", bytes(256))
    found = artifacts.open_artifact(any_url)
    with pytest.raises(artifacts.ArtifactCorrupt, match=r"data\.bin is corrupt"):
        found.verify()
    if "://" in any_url:
        with pytest.raises(artifacts.ArtifactCorrupt, match=r"data\.bin does not have the bytes"):
            found.local("deep/er/data.bin")
        assert not [p for p in artifacts.cache_folder().rglob("*") if p.is_file()]
    filesystem, root = artifacts.locate(any_url)
    filesystem.rm_file(f"{root}/deep/er/data.bin")
    with pytest.raises(artifacts.ArtifactCorrupt, match=r"data\.bin is gone"):
        made.verify()


def test_a_fetched_copy_serves_again_and_a_cut_copy_is_fetched_anew(s3_url):
    made = make(s3_url)
    copy = made.local("deep/er/data.bin")
    copy.write_bytes(b"cut by a full disk")
    assert made.local("deep/er/data.bin").read_bytes() == bytes(range(256))
    filesystem, root = artifacts.locate(s3_url)
    filesystem.rm_file(f"{root}/deep/er/data.bin")
    assert made.local("deep/er/data.bin").read_bytes() == bytes(range(256))  # from the cache


def test_a_file_that_the_manifest_does_not_name_is_not_handed_out(tmp_path):
    made = make(tmp_path / "a")
    (tmp_path / "secret").write_text("x")
    with pytest.raises(artifacts.ArtifactMissing, match="has no file"):
        made.local("../secret")
    with pytest.raises(artifacts.ArtifactMissing, match="has no folder"):
        made.local_folder("dee")


@pytest.mark.parametrize("path", ["../x", "a/../../x", "/etc/passwd", "", ".", "a\\..\\x", "a\nb"])
def test_a_manifest_whose_paths_lead_outside_is_not_read(tmp_path, path):
    make(tmp_path / "a")
    manifest = json.loads((tmp_path / "a" / artifacts.MANIFEST).read_text())
    manifest["files"][0]["path"] = path
    (tmp_path / "a" / artifacts.MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(artifacts.ArtifactMissing, match="not a path inside an artifact"):
        artifacts.open_artifact(tmp_path / "a")


def test_a_manifest_cut_anywhere_is_unseen_and_the_next_writer_completes(tmp_path):
    make(tmp_path / "a")
    content = (tmp_path / "a" / artifacts.MANIFEST).read_bytes()
    for length in range(0, len(content), 40):
        (tmp_path / "a" / artifacts.MANIFEST).write_bytes(content[:length])
        (tmp_path / "a" / artifacts.MARKER).touch()  # it is there until the manifest is whole
        assert not artifacts.exists(tmp_path / "a")
        assert make(tmp_path / "a").verify()
    (tmp_path / "a" / artifacts.MANIFEST).write_bytes(bytes(len(content)))  # as a power failure can leave it
    assert not artifacts.exists(tmp_path / "a")


def test_a_stage_that_writes_the_manifests_name_is_told(any_url):
    with pytest.raises(artifacts.ArtifactError, match="that name is the manifest's"):
        make(any_url, produce=lambda writer: writer.write_json(artifacts.MANIFEST, {}))
    nested = make(any_url, produce=lambda writer: writer.write_json(f"web/{artifacts.MANIFEST}", {}))
    assert nested.verify().paths() == [f"web/{artifacts.MANIFEST}"]


# Kills: see kill_artifacts.py, which asserts after each one


def kills(way: str, url: str) -> int:
    command = [sys.executable, str(Path(__file__).with_name("kill_artifacts.py")), way, url]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    return int(done.stdout)


def test_killed_at_every_fault_point(any_url):
    assert kills("fault", f"{any_url}/run") == 4


def test_killed_before_every_file_operation(tmp_path):
    assert kills("operations", str(tmp_path / "run")) > 30


def test_killed_at_random_moments(tmp_path):
    assert kills("moments", str(tmp_path / "run")) > 5


@pytest.mark.slow
def test_killed_before_and_after_every_request_to_object_storage(s3_url):
    assert kills("operations", f"{s3_url}/run") > 30


@pytest.mark.slow
def test_killed_at_random_moments_on_object_storage(s3_url):
    assert kills("moments", f"{s3_url}/run") > 5


# Properties


@settings(max_examples=30)
@given(
    st.dictionaries(
        st.text("abc/", min_size=1, max_size=8).filter(lambda path: not path.startswith("/") and "//" not in path),
        st.binary(max_size=64),
        max_size=4,
    )
)
def test_any_set_of_files_comes_back(tmp_path_factory, contents):
    contents = {path.rstrip("/"): content for path, content in contents.items()}
    folders = {str(parent) for path in contents for parent in Path(path).parents}
    contents = {path: content for path, content in contents.items() if path not in folders}

    def write(writer: artifacts.Writer) -> None:
        for path, content in contents.items():
            (writer.folder / path).parent.mkdir(parents=True, exist_ok=True)
            (writer.folder / path).write_bytes(content)

    url = tmp_path_factory.mktemp("property") / "a"
    made = make(url, produce=write)
    assert {path: made.local(path).read_bytes() for path in made.verify().paths()} == contents
    artifacts.discard(url)
    assert list(url.rglob("*")) == []


def test_what_the_disk_refuses_is_an_oserror_where_safetensors_writes_too(tmp_path):
    def produce(writer):
        save_file({"a": np.zeros(1 << 20, np.float32)}, writer.folder / "a.safetensors")

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    try:
        with pytest.raises(OSError, match="File too large") as caught:
            artifacts.ensure(tmp_path / "a", produce, kind="sample", config={})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.errno == errno.EFBIG
    assert not artifacts.exists(tmp_path / "a")
    assert artifacts.ensure(tmp_path / "a", produce, kind="sample", config={}).verify()


def test_object_storage_that_is_not_there_is_an_oserror_in_one_sentence():
    exceptions = pytest.importorskip("botocore.exceptions")
    with pytest.raises(OSError, match=r"object storage failed: Could not connect .* goes on"), artifacts.os_errors():
        raise exceptions.EndpointConnectionError(endpoint_url="http://127.0.0.1:1/a")
    with pytest.raises(OSError, match=r"object storage failed: Unable to locate credentials$"), artifacts.os_errors():
        raise exceptions.NoCredentialsError  # which does not pass
    with pytest.raises(KeyError), artifacts.os_errors():  # what is no storage's fault stays what it is
        raise KeyError("a")


def test_a_model_is_a_folder_of_a_finished_artifact_by_url_or_a_name(tmp_path, s3_url):
    make(f"{s3_url}/run/tuned")
    near = artifacts.model_source(f"{s3_url}/run/tuned/deep/er/")
    assert Path(near, "data.bin").read_bytes() == bytes(range(256))
    assert Path(artifacts.model_source(f"{s3_url}/run/tuned"), "deep/er/data.bin").exists()
    make(tmp_path / "here")
    assert Path(artifacts.model_source(f"file://{tmp_path}/here/deep/er"), "data.bin").exists()
    for name in ("tiny", "organisation/model", "./folder", str(tmp_path)):
        assert artifacts.model_source(name) == name
    with pytest.raises(artifacts.ArtifactMissing, match="has no folder 'deeper'"):
        artifacts.model_source(f"{s3_url}/run/tuned/deeper")
    with pytest.raises(artifacts.ArtifactMissing, match="is no folder of a finished artifact"):
        artifacts.model_source(f"{s3_url}/run")
