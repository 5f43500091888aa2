"""Files that are written by several at once, and what killed writers leave."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from recipe import ROOT

from cosyvoice.runtime import temporary_files
from cosyvoice.runtime.errors import InputError
from cosyvoice.utils.file_utils import atomic_write

WRITE_AND_STOP = (
    "import sys, time; from pathlib import Path; from cosyvoice.utils.file_utils import atomic_write\n"
    "with atomic_write(Path(sys.argv[1])) as temporary:\n"
    "    temporary.write_text('half')\n"
    "    print(temporary.name, flush=True)\n"
    "    time.sleep(600)\n"
)


def test_a_writer_that_was_given_up_does_not_touch_what_its_replacement_wrote(tmp_path: Path) -> None:
    """A machine that Ray has given up may still be writing when another has done its work."""
    path = tmp_path / "parquet_000000000.tar"
    with atomic_write(path) as given_up, given_up.open("w") as file:
        file.write("ha")
        file.flush()
        with atomic_write(path) as replacement:
            replacement.write_text("whole")
        assert path.read_text() == "whole"
        file.write("lf")
        file.flush()
        assert path.read_text() == "whole"
        file.write(" and whole")
    assert path.read_text() == "half and whole"
    assert list(tmp_path.iterdir()) == [path]


def test_threads_share_no_file(tmp_path: Path) -> None:
    together = threading.Barrier(4, timeout=60)

    def write(number: int) -> None:
        with atomic_write(tmp_path / "new" / "one.txt") as temporary:
            temporary.write_text(str(number))
            together.wait()
            assert temporary.read_text() == str(number)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not together.broken
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["one.txt"]


def test_what_a_killed_writer_left_is_removed_and_a_living_ones_stays(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WRITE_AND_STOP, str(tmp_path / "model.pt")]
    writers = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    try:
        killed, living = (writer.stdout.readline().strip() for writer in writers)
        assert killed != living and {path.name for path in tmp_path.iterdir()} == {killed, living}
        writers[0].kill()
        writers[0].wait()
        with atomic_write(tmp_path / "other.txt") as temporary:
            temporary.write_text("whole")
        assert {path.name for path in tmp_path.iterdir()} == {living, "other.txt"}
    finally:
        for writer in writers:
            writer.kill()
            writer.communicate()


def abandoned(folder: Path, machine: str, process: int) -> Path:
    path = folder / f".model.{machine}-{process}-0123abcd.part.pt"
    path.touch()
    return path


def test_a_file_of_another_machine_is_removed_when_it_is_old(tmp_path: Path) -> None:
    young, old = abandoned(tmp_path, "00000000", 1), abandoned(tmp_path, "00000000", 2)
    day_before_yesterday = time.time() - 2 * 24 * 3600
    os.utime(old, (day_before_yesterday, day_before_yesterday))
    others = [tmp_path / name for name in (".model.part.pt", ".model.pt", "model.00000000-2-0123abcd.part.pt")]
    for path in others:
        path.touch()
        os.utime(path, (0, 0))
    with atomic_write(tmp_path / "model.pt"):
        pass
    assert set(tmp_path.iterdir()) == {young, tmp_path / "model.pt", *others}


def test_a_number_that_a_killed_process_had_before_protects_nothing(tmp_path: Path) -> None:
    """In a container, processes often get the same numbers each time."""
    abandoned(tmp_path, temporary_files._machine(), os.getpid())
    with atomic_write(tmp_path / "model.pt"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt"]


def test_a_folder_is_listed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listed = []
    listdir = os.listdir
    monkeypatch.setattr(os, "listdir", lambda folder: listed.append(folder) or listdir(folder))
    for number in range(5):
        with atomic_write(tmp_path / f"{number}.txt"):
            pass
    assert listed == [tmp_path.resolve()]


def test_long_names_and_places_that_are_no_folder(tmp_path: Path) -> None:
    long = tmp_path / ("ß" * 120 + ".txt")  # 244 bytes
    with atomic_write(long) as temporary:
        temporary.write_text("whole")
        assert temporary.suffix == ".txt"
    assert list(tmp_path.iterdir()) == [long]
    with pytest.raises(InputError, match="cannot write .*; choose another folder"), atomic_write(long / "inside.txt"):
        pass
    assert list(tmp_path.iterdir()) == [long]
