"""Atomic files: what a reader finds after errors, kills and full disks."""

import fcntl
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import pytest
from support import link_to_a_name_too_long, spoil

from cwdm.errors import InputError, NameInUseError, OutputError
from cwdm.files import (
    _open_hidden,
    _open_unnamed,
    _write_under_hidden_name,
    check_apart,
    check_no_source_in,
    check_writable,
    exists,
    files_below,
    is_file,
    is_folder,
    is_link,
    machine,
    matching,
    read_json,
    remove_stale,
    sha256,
    write_atomically,
    write_json,
)

Writer = Callable[[Path, Callable[[BinaryIO], None]], None]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[1])}
both_ways = pytest.mark.parametrize("writer", [write_atomically, _write_under_hidden_name])


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def put(contents: bytes) -> Callable[[BinaryIO], None]:
    def write(file: BinaryIO) -> None:
        file.write(contents)

    return write


@both_ways
@pytest.mark.parametrize("before", [None, b"old and longer than the new"])
def test_writes_and_replaces(tmp_path: Path, writer: Writer, before: bytes | None) -> None:
    path = tmp_path / "a.bin"
    if before is not None:
        path.write_bytes(before)
    writer(path, put(b"new"))
    assert path.read_bytes() == b"new"
    assert names(tmp_path) == ["a.bin"]


def run_python(code: str, path: Path, prefix: Sequence[str] = ()) -> "subprocess.CompletedProcess[str]":
    command = [*prefix, sys.executable, "-c", code, str(path)]
    return subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, check=True)


@both_ways
def test_permissions_follow_the_umask(tmp_path: Path, writer: Writer) -> None:
    before = os.umask(0o027)
    try:
        writer(tmp_path / "a", put(b""))
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o640


@both_ways
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_while_writing_leaves_the_old_file(tmp_path: Path, writer: Writer, error: type[BaseException]) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"old")

    def write(file: BinaryIO) -> None:
        file.write(b"half")
        raise error

    with pytest.raises(error):
        writer(path, write)
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["a"]


@both_ways
def test_the_longest_name_works(tmp_path: Path, writer: Writer) -> None:
    path = tmp_path / ("n" * 255)
    writer(path, put(b"x"))
    assert path.read_bytes() == b"x"


def test_a_link_is_replaced_and_its_target_kept(tmp_path: Path) -> None:
    (tmp_path / "target").write_bytes(b"kept")
    (tmp_path / "link").symlink_to("target")
    write_atomically(tmp_path / "link", put(b"new"))
    assert (tmp_path / "target").read_bytes() == b"kept"
    assert not (tmp_path / "link").is_symlink()


def test_a_reader_never_sees_a_part(tmp_path: Path) -> None:
    path = tmp_path / "a"
    versions = [bytes([number]) * 200_000 for number in range(30)]
    write_atomically(path, put(versions[0]))
    seen: set[bytes] = set()
    done = threading.Event()

    def read() -> None:
        while not done.is_set():
            seen.add(path.read_bytes())

    reader = threading.Thread(target=read)
    reader.start()
    for version in versions:
        write_atomically(path, put(version))
    done.set()
    reader.join()
    assert seen
    assert seen <= set(versions)


KILLED = textwrap.dedent("""
    import sys, time
    from pathlib import Path
    from cwdm.files import write_atomically, _write_under_hidden_name

    def write(file):
        file.write(b"half" * 100_000)
        file.flush()
        print("writing", flush=True)
        time.sleep(60)

    globals()[sys.argv[1]](Path(sys.argv[2]), write)
""")


def start_writer(writer: Writer, path: Path) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-c", KILLED, writer.__name__, str(path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, env=ENVIRONMENT)
    assert process.stdout is not None
    assert process.stdout.readline() == b"writing\n"
    return process


def end(process: "subprocess.Popen[bytes]") -> None:
    process.send_signal(signal.SIGKILL)
    process.communicate()


def test_a_killed_writer_leaves_nothing(tmp_path: Path) -> None:
    if _open_unnamed(tmp_path) is None:
        pytest.skip("this file system has no unnamed files (O_TMPFILE)")
    (tmp_path / "a").write_bytes(b"old")
    end(start_writer(write_atomically, tmp_path / "a"))
    assert names(tmp_path) == ["a"]
    assert (tmp_path / "a").read_bytes() == b"old"


def test_the_remains_of_a_killed_writer_are_removed_and_only_those(tmp_path: Path) -> None:
    keep = [".cwdm-notes.txt", ".hidden", ".cwdm-0123.tmp", "cwdm-0123456789abcdef.tmp"]
    for name in keep:
        (tmp_path / name).write_bytes(b"")
    (tmp_path / ".cwdm-0123456789abcdef.tmp").mkdir()
    (tmp_path / ".cwdm-fedcba9876543210.tmp").symlink_to(".hidden")
    keep += [".cwdm-0123456789abcdef.tmp", ".cwdm-fedcba9876543210.tmp"]

    process = start_writer(_write_under_hidden_name, tmp_path / "a")
    try:
        remove_stale(tmp_path)
        assert len(names(tmp_path)) == len(keep) + 1, "a live writer's file must stay"
    finally:
        end(process)
    assert len(names(tmp_path)) == len(keep) + 1
    remove_stale(tmp_path)
    assert names(tmp_path) == sorted(keep)


def test_cleaning_up_beside_other_writers(tmp_path: Path) -> None:
    def write() -> None:
        for _ in range(300):
            _write_under_hidden_name(tmp_path / "a", lambda file: file.write(b"new"))

    with ThreadPoolExecutor(2) as pool:
        writing = [pool.submit(write) for _ in range(2)]
        while not all(future.done() for future in writing):
            remove_stale(tmp_path)
    for future in writing:
        future.result()
    assert names(tmp_path) == ["a"]


def hidden_name(machine: str, number: int) -> str:
    return f".cwdm-{machine}-{number}-0123456789abcdef.tmp"


def test_files_of_other_machines_are_removed_by_age_alone(tmp_path: Path) -> None:
    """Their locks may not be seen here, as on a shared file system that keeps locks within a machine."""
    elsewhere = "0" * 8
    fresh, old, earlier = (tmp_path / hidden_name(elsewhere, number) for number in (1, 2, 3))
    by_earlier_versions = tmp_path / ".cwdm-0123456789abcdef.tmp"
    here = tmp_path / hidden_name(machine(), 1)
    for path in (fresh, old, earlier, by_earlier_versions, here):
        path.touch()
    two_days_ago = time.time() - 2 * 24 * 3600
    os.utime(old, (two_days_ago, two_days_ago))
    os.utime(earlier, (two_days_ago, two_days_ago))
    with earlier.open("rb") as locked:
        fcntl.flock(locked, fcntl.LOCK_EX)
        remove_stale(tmp_path)
    assert names(tmp_path) == sorted(path.name for path in (fresh, earlier, by_earlier_versions))


def test_a_file_that_vanishes_while_it_is_written_is_said(tmp_path: Path) -> None:
    def write(file: BinaryIO) -> None:
        (hidden,) = tmp_path.iterdir()
        hidden.unlink()

    with pytest.raises(OutputError, match="vanished while it was written"):
        _write_under_hidden_name(tmp_path / "a", write)


def test_a_name_that_cannot_be_written_is_told_from_a_folder_that_cannot(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    for name, said in (("a", "a folder has that name"), ("n" * 256, "longer than the system allows")):
        with pytest.raises(NameInUseError, match=said) as caught:
            write_atomically(tmp_path / name, put(b"x"))
        assert str(tmp_path / name) in str(caught.value)


def test_a_folder_mounted_twice_is_one_folder(tmp_path: Path) -> None:
    (tmp_path / "input" / "case").mkdir(parents=True)
    (tmp_path / "output").mkdir()
    mount = ["mount", "--bind", str(tmp_path / "input"), str(tmp_path / "output")]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting needs root")
    try:
        for target in ("output", "output/new", "output/case"):
            with pytest.raises(InputError, match="choose another folder"):
                check_apart(tmp_path / target, tmp_path / "input")
        (tmp_path / "input" / "case" / "a").touch()
        with pytest.raises(InputError, match="choose another folder"):
            check_no_source_in([tmp_path / "output" / "case"], [tmp_path / "input" / "case" / "a"])
    finally:
        subprocess.run(["umount", str(tmp_path / "output")], check=True)


def test_a_link_that_leads_to_itself_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / "round").symlink_to("round")
    check_apart(tmp_path / "out", tmp_path / "round")
    with pytest.raises(InputError, match="lies in"):
        check_apart(tmp_path / "round", tmp_path)


def test_hidden_files_are_locked_while_open(tmp_path: Path) -> None:
    hidden, file = _open_hidden(tmp_path)
    with file, hidden.open("rb") as other, pytest.raises(BlockingIOError):
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(mount, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("mounting a small file system needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk(small_disk: Path) -> None:
    write_atomically(small_disk / "a", put(b"old"))
    with pytest.raises(OutputError, match=r"disk.*full.*free some space") as caught:
        write_atomically(small_disk / "a", put(bytes(3 << 20)))
    assert str(small_disk) in str(caught.value)
    assert (small_disk / "a").read_bytes() == b"old"
    assert names(small_disk) == ["a"]
    write_atomically(small_disk / "b", put(bytes(500_000)))  # the failed file's space was given back


def test_a_full_disk_under_a_hidden_name(small_disk: Path) -> None:
    with pytest.raises(OSError, match="No space left"):
        _write_under_hidden_name(small_disk / "a", put(bytes(3 << 20)))
    assert names(small_disk) == []


def test_a_read_only_disk(small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(OutputError, match="mounted read-only"):
        write_atomically(small_disk / "a", put(b"x"))


AS_NOBODY = textwrap.dedent("""
    import os, sys
    from pathlib import Path
    from cwdm.files import write_atomically
    if os.geteuid() == 0:
        os.setuid(65534)
    try:
        write_atomically(Path(sys.argv[1]), lambda file: None)
    except Exception as error:
        print(type(error).__name__, error)
""")


def test_a_folder_without_permission() -> None:
    # Not tmp_path: pytest keeps other users out of the folders above it.
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o555)
        output = run_python(AS_NOBODY, Path(folder) / "a").stdout
    assert output.startswith("OutputError")
    assert "no permission" in output
    assert folder in output


FILE_SIZE_LIMIT = textwrap.dedent("""
    import resource, sys
    from pathlib import Path
    from cwdm.files import write_atomically
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    try:
        write_atomically(Path(sys.argv[1]), lambda file: file.write(bytes(100_000)))
    except Exception as error:
        print(type(error).__name__, error)
""")


def test_a_file_size_limit(tmp_path: Path) -> None:
    output = run_python(FILE_SIZE_LIMIT, tmp_path / "a").stdout
    assert output.startswith("OutputError")
    assert names(tmp_path) == []


WRITE = textwrap.dedent("""
    import sys
    from pathlib import Path
    from cwdm.files import write_atomically
    write_atomically(Path(sys.argv[1]), lambda file: file.write(b"x"))
""")


def test_without_proc(tmp_path: Path) -> None:
    """The unnamed file cannot be given its name; its contents are copied instead."""
    in_private_mounts = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs none /proc && exec "$@"', "sh"]
    if shutil.which("unshare") is None or subprocess.run([*in_private_mounts, "true"], check=False).returncode:
        pytest.skip("hiding /proc needs root")
    for _ in range(2):
        run_python(WRITE, tmp_path / "a", prefix=in_private_mounts)
        assert (tmp_path / "a").read_bytes() == b"x"
        assert names(tmp_path) == ["a"]


def test_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="no such folder"):
        write_atomically(tmp_path / "none" / "a", put(b""))
    with pytest.raises(OutputError, match="no such folder"):
        remove_stale(tmp_path / "none")


def test_a_folder_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    with pytest.raises(OutputError):
        write_atomically(tmp_path / "a", put(b"x"))
    assert names(tmp_path) == ["a"]


def test_check_writable_makes_the_folder_and_leaves_nothing(tmp_path: Path) -> None:
    check_writable(tmp_path / "a" / "b")
    assert names(tmp_path / "a" / "b") == []
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="that is a file"):
        check_writable(tmp_path / "file")


def test_check_writable_on_a_read_only_disk(small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(OutputError, match="mounted read-only"):
        check_writable(small_disk)


# Looking and reading


def test_what_cannot_be_looked_at_is_not_there(tmp_path: Path) -> None:
    for place in (tmp_path / ("x" * 300), tmp_path / "a" / "b", tmp_path / "link"):
        link_to_a_name_too_long(tmp_path / "link")
        assert [is_file(place), is_folder(place), exists(place)] == [False] * 3, place
        assert is_link(place) is (place.name == "link")
        assert matching(place, "*") == files_below(place) == []
    (tmp_path / "b").mkdir()
    for name in (".hidden.txt", "b/one.txt", "two.txt"):
        (tmp_path / name).touch()
    assert [path.name for path in matching(tmp_path, "*.txt")] == [".hidden.txt", "two.txt"]
    assert [path.name for path in files_below(tmp_path)] == [".hidden.txt", "one.txt", "two.txt"]


def test_links_to_names_that_are_too_long_lie_in_no_folder(tmp_path: Path) -> None:
    link_to_a_name_too_long(tmp_path / "link")
    (tmp_path / "out").mkdir()
    check_no_source_in([tmp_path / "out"], [tmp_path / "link"])
    with pytest.raises(InputError, match="lies in"):
        check_no_source_in([tmp_path], [tmp_path / "link"])


def test_json_comes_back_as_it_was_written(tmp_path: Path) -> None:
    content = {"a": [1, 2.5, None, {"b": "\udc80 ü"}], "c": {}}
    write_json(tmp_path / "x.json", content)
    assert read_json(tmp_path / "x.json") == content


@pytest.mark.parametrize("content", ["[" * 100_000, "[" * 80 + "]" * 80, "{", "1" * 5000, b"\xff", '"too long by one"'])
def test_json_that_nobody_can_mean_is_a_value_error(tmp_path: Path, content: str | bytes) -> None:
    (tmp_path / "x.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError):  # noqa: PT011  # each its own
        read_json(tmp_path / "x.json", most_bytes=16 if "too long" in str(content) else 1 << 20)


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    spoil(tmp_path / "pipe", "pipe")
    for path in (tmp_path / "pipe", tmp_path, Path("/dev/zero")):
        for read in (read_json, sha256):
            with pytest.raises(OSError, match="is not a regular file"):
                read(path)
