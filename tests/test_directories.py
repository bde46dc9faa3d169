"""Directories that are replaced as a whole: readers see one of them at any moment, and a kill leaves one."""

import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from gmn_lopt.util import directories
from gmn_lopt.util.directories import read_directory, remove_litter, write_directory
from gmn_lopt.util.errors import FileError

SIZES = {"a": 10**6, "b": 10**6}


def content(number):
    return {name: f"{name} {number}".encode() * 1000 for name in SIZES}


def cannot(*_):
    raise OSError(22, "Invalid argument")


@pytest.fixture(params=[True, False], ids=["exchanged", "renamed twice"])
def exchange(request, monkeypatch):
    """Whether the file system can exchange two directories; network file systems cannot."""
    if not request.param:
        monkeypatch.setattr(directories, "_exchange", cannot)
    return request.param


def test_a_reader_sees_one_whole_directory_at_any_moment(tmp_path, exchange):
    path, every, done = tmp_path / "saved", [content(i) for i in range(100)], threading.Event()
    write_directory(path, every[0])
    seen, failures = set(), []

    def read():
        while not done.is_set():
            try:
                seen.add(every.index(read_directory(path, SIZES)))
            except Exception as error:
                failures.append(repr(error))

    readers = [threading.Thread(target=read) for _ in range(3)]
    for reader in readers:
        reader.start()
    for each in every[1:]:
        write_directory(path, each)
    done.set()
    for reader in readers:
        reader.join()
    assert not failures and len(seen) > 5, failures[:3]
    assert [entry.name for entry in tmp_path.iterdir()] == ["saved"]


def test_what_killed_writers_left_is_removed_by_a_later_one(tmp_path):
    names = [".saved.new-abcdefgh", ".saved.new-recently", ".saved.old-abcdefgh", ".other.new-abcdefgh"]
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "a").write_text("half of it")
        if "recently" not in name:
            os.utime(tmp_path / name, (0, 0))
    write_directory(tmp_path / "saved", content(1))
    assert sorted(os.listdir(tmp_path)) == sorted([*names[1:], "saved"])


def test_a_link_stays_and_what_it_leads_to_is_replaced(tmp_path, exchange):
    (tmp_path / "large disk").mkdir()
    (tmp_path / "saved").symlink_to("large disk/saved")
    for number in range(2):
        write_directory(tmp_path / "saved", content(number))
        assert read_directory(tmp_path / "saved", SIZES) == content(number)
    assert (tmp_path / "saved").is_symlink() and os.listdir(tmp_path / "large disk") == ["saved"]
    assert sorted(os.listdir(tmp_path)) == ["large disk", "saved"]


KILLED = """
import os, sys
from pathlib import Path
from gmn_lopt.util import directories
from test_directories import cannot, content

place, can_exchange = Path(sys.argv[1]), sys.argv[2] == "True"
if not can_exchange:
    directories._exchange = cannot
left = None

def kill(name, arguments):
    global left
    if left is not None and name in ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.chmod"):
        left -= 1
        if left < 0:
            os.kill(os.getpid(), 9)

sys.addaudithook(kill)
for event in range(100):
    path = place / str(event) / "saved"
    directories.write_directory(path, content(0))
    child = os.fork()
    if not child:
        left = event
        directories.write_directory(path, content(1))
        os._exit(0)
    if os.waitpid(child, 0)[1] == 0:
        break
"""


def test_a_kill_at_any_file_event_leaves_a_whole_directory(tmp_path, exchange):
    paths = os.pathsep.join(map(str, (Path(__file__).parent, Path(__file__).parents[1])))
    command = [sys.executable, "-c", KILLED, str(tmp_path), str(exchange)]
    subprocess.run(command, env=os.environ | {"PYTHONPATH": paths}, check=True)
    places = sorted(tmp_path.iterdir(), key=lambda place: int(place.name))
    assert 5 < len(places) < 100
    found = []
    for place in places:
        found.append(read_directory(place / "saved", SIZES))
        remove_litter(place)
        assert [entry.name for entry in place.iterdir()] == ["saved"]
        assert read_directory(place / "saved", SIZES) == found[-1]
    assert all(each in (content(0), content(1)) for each in found)
    assert (found[0], found[-1]) == (content(0), content(1))


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(FileError, match="nowhere is missing"):
        read_directory(tmp_path / "nowhere", SIZES)
    write_directory(tmp_path / "saved", {"a": b"1"})
    with pytest.raises(FileError, match="saved/b is missing"):
        read_directory(tmp_path / "saved", SIZES)
    shutil.rmtree(tmp_path / "saved")
    (tmp_path / "saved").write_text("a file")
    with pytest.raises(FileError, match="saved cannot be read: Not a directory"):
        read_directory(tmp_path / "saved", SIZES)
