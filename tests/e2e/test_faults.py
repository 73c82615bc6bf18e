"""What machines do to a job: full and read-only disks, storage that does not answer, and files made to do harm."""

from __future__ import annotations

import ast
import errno
import re
import resource
import shutil
import struct
import tarfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import fsspec
import pytest
from click.testing import CliRunner, Result
from fsspec.implementations.memory import MemoryFileSystem

from dimefm.caching.encode_shard import encode_shard
from dimefm.caching.plan import PlanRequest, open_or_plan
from dimefm.cli import cli
from dimefm.errors import SourceError, StoreError
from dimefm.images.decode import DecodeError, decode_fast
from dimefm.inspection.verify import VerifyConfig, verify
from dimefm.models.clip import Clip
from dimefm.retrieval.faiss_index import FaissIndex
from dimefm.retrieval.index_parts import PartTask, build_part
from dimefm.retrieval.index_search import IndexSearch
from dimefm.store.embedding_store import Store
from dimefm.store.selected_texts import SelectedTexts
from dimefm.system import storage
from dimefm.system.lock import writing
from dimefm.system.named_paths import VARIABLE
from tests.disks import Disk
from tests.making import make_jpeg, read_tar, write_tar
from tests.processes import Command, result_of
from tests.stores import random_store

ROOT = Path(__file__).parents[2]


def encode_rest(request: PlanRequest, out: Path, clip: Clip) -> Store:
    """What the cache command does, without Ray: the lock, then plan or open, and every shard without a commit."""
    with writing(str(out)):
        store = open_or_plan(request, str(out), clip.identity)
        storage.remove_leftovers(store.path)
        for shard in sorted(set(range(store.schema.shards)) - store.committed()):
            encode_shard(store, shard, clip)
    return store


def contents(store: Path) -> dict[str, bytes]:
    """Every file but commits, which say when they were made."""
    names = storage.tree(str(store))
    return {name: (store / name).read_bytes() for name in names if not name.startswith("commits/")}


@pytest.fixture(scope="module")
def source(sample: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    members = read_tar(sample / "images" / "train-00000.tar", 24)
    return write_tar(tmp_path_factory.mktemp("faults") / "images.tar", members)


@pytest.fixture(scope="module")
def request_(source: Path) -> PlanRequest:
    return PlanRequest(kind="image", arguments=(str(source),), shard_rows=8, batch_size=8, pixels=64)


@pytest.fixture(scope="module")
def undisturbed(request_: PlanRequest, source: Path, clip: Clip) -> Path:
    return Path(encode_rest(request_, source.with_name("undisturbed.zarr"), clip).path)


# -- disks ------------------------------------------------------------------------------------------------------------


def few_of(*sizes: int, fast: tuple[int, ...]) -> list[Any]:
    """Parameters, of which those that are not `fast` are slow."""
    return [size if size in fast else pytest.param(size, marks=pytest.mark.slow) for size in sizes]


@pytest.mark.parametrize("size", few_of(4, 8, 16, 24, 32, 48, 64, 96, 128, fast=(4, 24, 64, 128)))
def test_a_disk_that_is_full_at_any_moment_ends_the_job_with_what_to_do_and_costs_nothing(
    disk: Disk, request_: PlanRequest, undisturbed: Path, clip: Clip, size: int
) -> None:
    """While it is locked, planned, or in any of the files of a shard."""
    out = disk.path / "s.zarr"
    disk.options(f"size={size}k")
    with pytest.raises(StoreError, match=r"cannot be written: No space left on device\n  remedy: make room") as caught:
        encode_rest(request_, out, clip)
    assert str(caught.value).startswith(str(out))
    assert not list(out.rglob("*.unfinished"))
    with suppress(StoreError):  # it may not have come to be a store
        report = verify(VerifyConfig(store=str(out)))
        assert not report.bad
        assert not report.faults
    disk.options("size=4m")
    assert contents(Path(encode_rest(request_, out, clip).path)) == contents(undisturbed)
    assert verify(VerifyConfig(store=str(out))).trusted


def test_a_disk_without_a_free_byte_is_refused(disk: Disk) -> None:
    with suppress(OSError), (disk.path / "other").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    with pytest.raises(StoreError, match="cannot be written: No space left on device"), writing(str(disk.path / "s")):
        pass
    assert [path.name for path in disk.path.iterdir()] == ["other"]


def test_the_sizes_above_cover_planning_and_every_shard(undisturbed: Path) -> None:
    blocks = sum(-(-path.stat().st_size // 4096) * 4 for path in undisturbed.rglob("*") if path.is_file())
    assert 128 < blocks < 256


def test_the_command_on_a_full_disk_says_so_and_goes_on_when_there_is_room(
    disk: Disk, source: Path, teacher_name: str, undisturbed: Path, request_: PlanRequest, clip: Clip
) -> None:
    """What a worker of Ray's cannot write arrives as the same message, and nothing of what it has done is lost."""
    out = disk.path / "s.zarr"
    sizes = ["--shard-rows", "8", "--batch-size", "8", "--pixels", "64", "--workers", "1", "--device", "cpu"]
    words = ["cache-images", str(source), "--teacher", teacher_name, *sizes, "--out", str(out)]
    disk.options("size=128k")
    output = Command(words).finish(code=1)
    assert "Traceback" not in output
    what = f"Error: {out} cannot be written: No space left on device\n  remedy: make room, and"
    assert what in output
    kept = {path: path.stat().st_mtime_ns for path in (out / "commits").iterdir()}
    assert kept
    disk.options("size=4m")
    assert contents(Path(encode_rest(request_, out, clip).path)) == contents(undisturbed)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept


@pytest.fixture
def read_only(disk: Disk, undisturbed: Path) -> Path:
    """A finished store on a disk that cannot be written to."""
    disk.options("size=4m")
    store = Path(shutil.copytree(undisturbed, disk.path / "s.zarr"))
    disk.options("ro")
    return store


@pytest.mark.parametrize("name", ["s.zarr", "other.zarr"])
def test_a_read_only_disk_is_refused_with_what_to_do(
    read_only: Path, source: Path, teacher_name: str, name: str
) -> None:
    out = read_only.with_name(name)
    words = ["cache-images", str(source), "--teacher", teacher_name, "--out", str(out), "--device", "cpu"]
    result = CliRunner().invoke(cli, words)
    assert result.exit_code == 1
    assert f"Error: {out} cannot be written: Read-only file system\n  remedy: " in result.output


@pytest.mark.parametrize("command", ["info", "verify"])
def test_a_store_on_a_read_only_disk_is_read(read_only: Path, command: str) -> None:
    result = CliRunner().invoke(cli, [command, str(read_only)])
    assert result.exit_code == 0, result.output


def test_repair_on_a_read_only_disk_is_refused(read_only: Path, disk: Disk) -> None:
    disk.options("rw")
    (read_only / "embedding" / "c" / "0" / "0").unlink()
    disk.options("ro")
    result = CliRunner().invoke(cli, ["verify", str(read_only), "--repair"])
    assert result.exit_code == 1
    assert f"Error: {read_only} cannot be written: Read-only file system" in result.output


# -- disks of an index, pairs and a selection --------------------------------------------------------------------------


class Work:
    """Two small stores, the words of the commands that follow on them, and what each leaves undisturbed."""

    def __init__(self, folder: Path) -> None:
        texts, _ = random_store(folder / "t.zarr", rows=600, shard_rows=128, kind="text")
        images, _ = random_store(folder / "i.zarr", rows=96, shard_rows=32, seed=1)
        self.index, self.pairs, self.selection = (folder / name for name in ("t.index", "p.zarr", "s.selection"))
        self._words = {
            "build-index": [texts.path, "--factory", "IVF16,SQ8", "--recall", "0.5"],
            "retrieve": [images.path, "--texts", texts.path, "--top-k", "4", "--device", "cpu"],
            "select-texts": [str(self.pairs), "--by", "similarity", "--size", "50", "--device", "cpu"],
        }
        self.undisturbed = {"build-index": self.index, "retrieve": self.pairs, "select-texts": self.selection}
        for command, out in self.undisturbed.items():
            result = self.run(command, out)
            assert result.exit_code == 0, result.output

    def run(self, command: str, out: Path, *more: str) -> Result:
        return CliRunner().invoke(cli, [command, *self._words[command], "--out", str(out), *more])


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of one shard, and no more queries than a recall is measured by."""
    monkeypatch.setattr("dimefm.retrieval.choose_index._PART_ROWS", (128, 128))
    monkeypatch.setattr("dimefm.retrieval.recall.QUERIES", 20)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Work:
    return Work(tmp_path_factory.mktemp("work"))


def pieces(out: Path) -> dict[Path, int]:
    """When each finished piece of work was written: parts of an index, shards of pairs, scores of sentences."""
    found = [*out.glob("build/*.json"), *out.glob("commits/0*.json"), *out.glob("scores/0*")]
    return {path: path.stat().st_mtime_ns for path in found}


def results(out: Path) -> dict[str, bytes]:
    """Every file but those that say when, or how fast."""
    return {name: data for name, data in contents(out).items() if name != "index.json"}


SIZES = {
    "build-index": [4, 8, 20, 32, 48, 68, 84],
    "retrieve": [4, 8, 16, 28, 36, 56, 316],
    "select-texts": [4, 8, 16, 28, 36, 40, 44],
}
"""In KiB, of disks on which a command comes ever further; on the last all pieces of work are finished, and yet it has
no room for what is made of them."""
PIECES = {"build-index": 6, "retrieve": 3, "select-texts": 5}


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize(("command", "size"), [
    pytest.param(command, size, marks=() if place in (1, 4, 6) else pytest.mark.slow)
    for command in SIZES for place, size in enumerate(SIZES[command])
])  # fmt: skip
def test_a_disk_that_is_full_ends_a_command_with_what_to_do_and_costs_nothing(
    disk: Disk, work: Work, command: str, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, built = disk.path / "out", list[str]()

    def counting(part: PartTask, *, use_gpus: bool) -> None:
        built.append(Path(part.file).stem)
        build_part(part)

    monkeypatch.setattr("dimefm.retrieval.index_parts.build_part", counting)
    disk.options(f"size={size}k")
    result = work.run(command, out)
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == 1
    message = rf"Error: {out}\S* cannot be written: No space left on device\n  remedy: make room, and run the same"
    assert len(re.findall(message, result.output)) == result.output.count("Error: ") == 1
    assert not list(out.rglob("*.unfinished"))
    for file in out.rglob("*.faiss"):
        assert FaissIndex.read(file), "a file that is not whole has got its name"
    kept = pieces(out)
    assert size < SIZES[command][-1] or len(kept) == PIECES[command]
    built.clear()
    disk.options("size=4m")
    result = work.run(command, out)
    assert result.exit_code == 0, result.output
    assert results(out) == results(work.undisturbed[command])
    if command == "build-index":
        assert not set(built) & {path.stem for path in kept}, "a finished part was built again"
    else:
        assert kept.items() <= pieces(out).items(), "a finished shard was done again"


@pytest.mark.parametrize("command", ["build-index", "retrieve", "select-texts"])
@pytest.mark.parametrize("finished", [False, True])
def test_a_command_whose_output_is_on_a_read_only_disk_is_refused(
    disk: Disk, work: Work, command: str, finished: bool
) -> None:
    out = disk.path / "out"
    if finished:
        disk.options("size=4m")
        shutil.copytree(work.undisturbed[command], out)
    disk.options("ro")
    result = work.run(command, out)
    assert result.exit_code == 1
    assert f"Error: {out} cannot be written: Read-only file system\n  remedy: " in result.output
    assert result.output[result.output.index("Error: ") :].count("\n") == 2


def test_what_lies_on_a_read_only_disk_is_read(disk: Disk, work: Work, tmp_path: Path) -> None:
    disk.options("size=4m")
    for folder in work.undisturbed.values():
        shutil.copytree(folder, disk.path / folder.name)
    disk.options("ro")
    for folder in work.undisturbed.values():
        assert CliRunner().invoke(cli, ["info", str(disk.path / folder.name)]).exit_code == 0
    IndexSearch.open(str(disk.path / "t.index"))
    result = CliRunner().invoke(cli, ["select-texts", str(disk.path / "p.zarr"), "--out", str(tmp_path / "s")])
    assert result.exit_code == 0, result.output
    selected, expected = (SelectedTexts(str(path)).rows() for path in (disk.path / "s.selection", work.selection))
    assert selected.tolist() == expected.tolist()


# -- storage that does not answer -------------------------------------------------------------------------------------


class FlakyFileSystem(MemoryFileSystem):
    """Files in memory whose reads fail as told: `failures[path]` is raised instead of an answer."""

    protocol = "flaky"
    store: dict[str, Any] = {}  # noqa: RUF012  # as MemoryFileSystem has its own
    pseudo_dirs = [""]  # noqa: RUF012
    failures: dict[str, OSError] = {}  # noqa: RUF012

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(super()._strip_protocol(path.removeprefix("flaky://")))

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **options: Any) -> Any:
        failure = self.failures.get(self._strip_protocol(path).rsplit("/", 1)[-1])
        if failure is not None:
            raise failure
        return super().cat_file(path, start=start, end=end, **options)


@pytest.fixture
def flaky(source: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, OSError]]:
    """Eight images on flaky://in, and what reads of them raise, by name."""
    fsspec.register_implementation("flaky", FlakyFileSystem, clobber=True)
    monkeypatch.setenv(VARIABLE, "flaky")
    monkeypatch.setattr("dimefm.sources.read_image._WAITS", (0.0,))
    fs = fsspec.filesystem("flaky")
    for number in range(8):
        fs.pipe_file(f"/in/{number}.jpg", make_jpeg(seed=number))
    fs.pipe_file("/tars/a.tar", source.read_bytes())
    yield FlakyFileSystem.failures
    FlakyFileSystem.failures.clear()
    fs.store.clear()


FLAKY = PlanRequest(kind="image", arguments=("flaky://in",), shard_rows=4)


def test_storage_that_fails_in_the_middle_ends_the_job_and_the_same_command_goes_on(
    flaky: dict[str, OSError], tmp_path: Path, clip: Clip
) -> None:
    undisturbed = Path(encode_rest(FLAKY, tmp_path / "undisturbed.zarr", clip).path)
    flaky["5.jpg"] = OSError(errno.EIO, "Input/output error")
    with pytest.raises(StoreError, match=r"flaky:///in/5.jpg cannot be read: (?s:.*)run the same command again once"):
        encode_rest(FLAKY, tmp_path / "s.zarr", clip)
    assert Store(str(tmp_path / "s.zarr")).committed() == {0}
    flaky.clear()
    assert contents(Path(encode_rest(FLAKY, tmp_path / "s.zarr", clip).path)) == contents(undisturbed)


@pytest.mark.parametrize("error", [
    OSError(errno.EIO, "Input/output error"), PermissionError(errno.EACCES, "no access"), PermissionError("expired"),
    FileNotFoundError(errno.ENOENT, "gone"), OSError("of a client's own"),
])  # fmt: skip
def test_a_tar_that_cannot_be_read_ends_the_planning(
    flaky: dict[str, OSError], tmp_path: Path, clip: Clip, error: OSError
) -> None:
    """Planned without it, its images would be missing for good; the same command goes on once the storage answers."""
    flaky["a.tar"] = error
    request = PlanRequest(kind="image", arguments=("flaky://tars/a.tar", "flaky://in"))
    with pytest.raises(SourceError, match=r"flaky://tars/a.tar cannot be read: (?s:.*)once the storage answers"):
        encode_rest(request, tmp_path / "s.zarr", clip)
    flaky.clear()
    assert encode_rest(request, tmp_path / "s.zarr", clip).schema.rows > 8


# -- files made to do harm --------------------------------------------------------------------------------------------


def png(width: int, height: int, more: bytes = b"") -> bytes:
    """A black image of one bit a pixel, a few bytes a million."""
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    packer = zlib.compressobj(1)
    line = bytes(1 + -(-width // 8)) * 100
    data = b"".join(packer.compress(line) for _ in range(height // 100)) + packer.flush()
    return b"\x89PNG\r\n\x1a\n" + b"".join(map(chunk, (b"IHDR", b"IDAT", b"IEND"), (header, data, b"")))


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def huge_jpeg() -> bytes:
    """A small JPEG that says it has 65,500 x 65,500 pixels."""
    data = bytearray(make_jpeg())
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = struct.pack(">HH", 65500, 65500)
    return bytes(data)


def huge_gif() -> bytes:
    size = struct.pack("<HH", 65535, 65535)
    return b"GIF89a" + size + b"\x80\0\0" + bytes(6) + b",\0\0\0\0" + size + b"\0\x02\x02\x4c\x01\0;"


def talkative_png() -> bytes:
    """A small PNG with a comment of 256 MiB."""
    packer = zlib.compressobj(9)
    comment = b"".join(packer.compress(bytes(1 << 20)) for _ in range(256)) + packer.flush()
    small = png(100, 100)
    return small[:33] + chunk(b"zTXt", b"Comment\0\0" + comment) + small[33:]


BOMBS: dict[str, Callable[[], bytes]] = {
    "png": lambda: png(40_000, 40_000),
    "smaller png": lambda: png(10_000, 9_000),
    "jpeg": huge_jpeg,
    "gif": huge_gif,
    "comment": talkative_png,
}


def measured(path: Path) -> tuple[str, int]:
    """What decoding the file ends with, and by how many MiB the most memory that this process ever had grows."""
    before = peak()
    try:
        decode_fast(path.read_bytes())
        status = "OK"
    except DecodeError as error:
        status = error.status.name
    return status, peak() - before


def peak() -> int:
    decode_fast(make_jpeg())  # loads what any image needs
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


@pytest.mark.parametrize(
    ("bomb", "status"),
    [
        ("png", "TOO_LARGE"),
        ("smaller png", "TOO_LARGE"),
        ("jpeg", "TOO_LARGE"),
        ("gif", "TOO_LARGE"),
        ("comment", "UNDECODABLE"),
    ],
)
def test_a_decompression_bomb_is_refused_before_it_takes_memory(tmp_path: Path, bomb: str, status: str) -> None:
    path = tmp_path / "bomb"
    path.write_bytes(BOMBS[bomb]())
    assert path.stat().st_size < 2 << 20
    found, megabytes = result_of(measured, path)
    assert found == status
    assert megabytes < 64


@pytest.mark.parametrize("pixels", [None, 64])
def test_names_in_a_tar_lead_nowhere(tmp_path: Path, clip: Clip, pixels: int | None) -> None:
    inside = tmp_path / "in" / "deep"
    names = ["../../evil.jpg", f"{tmp_path}/absolute.jpg", "a/../../../evil2.jpg", "fine.jpg", "..", "../x/"]
    write_tar(inside / "a.tar", {name: make_jpeg(seed=n) for n, name in enumerate(names)})
    with tarfile.open(inside / "b.tar", "w") as tar:
        link = tarfile.TarInfo("link.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    before = set(tmp_path.rglob("*"))
    request = PlanRequest(kind="image", arguments=(str(inside),), shard_rows=8, pixels=pixels)
    store = encode_rest(request, tmp_path / "s.zarr", clip)
    made = set(tmp_path.rglob("*")) - before
    assert {path.relative_to(tmp_path).parts[0] for path in made} == {"s.zarr"}
    assert not Path("/evil.jpg").exists()
    keys = [sample["key"] for sample in store.plan(0).to_pylist()]
    assert "fine" in keys
    assert "link" not in keys
    if pixels:
        with tarfile.open(tmp_path / "s.zarr" / "pixels" / "000000.tar") as tar:
            assert tar.getnames() == [f"{row:09d}.jpg" for row in range(store.schema.rows)]


_BETWEEN_OWN_PROCESSES = "pipeline/ray_shards.py"
"""Its workers unpickle what their own command pickled, as Ray does with all that goes between them."""


def test_nothing_is_unpickled() -> None:
    """What is read may come from anyone: no file of ours, and no input, may run code."""
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for folder in ("cache_schemas", "dimefm", "pipeline")
        for path in (ROOT / folder).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if _unpickles(node) and path.relative_to(ROOT).as_posix() != _BETWEEN_OWN_PROCESSES
    ]
    assert not found


def _unpickles(node: ast.AST) -> bool:
    if isinstance(node, ast.Import):
        return any(alias.name in _PICKLES for alias in node.names)
    if isinstance(node, ast.ImportFrom):
        return node.module in _PICKLES
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
        return False
    options = {word.arg: word.value for word in node.keywords}
    function = ast.unparse(node.func)
    if function == "torch.load":
        return not _is(options.get("weights_only"), True)
    if function in ("np.load", "numpy.load"):
        return "allow_pickle" in options and not _is(options["allow_pickle"], False)
    return function in ("pd.read_pickle", "torch.jit.load")


def _is(value: ast.expr | None, constant: bool) -> bool:
    return isinstance(value, ast.Constant) and value.value is constant


_PICKLES = ("pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal")


@pytest.mark.parametrize(
    ("line", "unpickles"),
    [
        ("import pickle", True),
        ("from pickle import loads", True),
        ("torch.load(path)", True),
        ("torch.load(path, weights_only=False)", True),
        ("torch.load(path, map_location='cpu', weights_only=True)", False),
        ("np.load(path, allow_pickle=True)", True),
        ("np.load(path)", False),
        ("json.load(path)", False),
    ],
)
def test_what_counts_as_unpickling(line: str, unpickles: bool) -> None:
    assert any(map(_unpickles, ast.walk(ast.parse(line)))) is unpickles
