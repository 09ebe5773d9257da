"""One program per output: who holds a lock, alive, dead, on another machine, in a bucket."""

import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from cloud_storage import emulate

from e5v_jax import lock
from e5v_jax.lock import LockedError, hold
from e5v_jax.storage import as_path

HOLD = """
import sys, time
from pathlib import Path
from e5v_jax.lock import hold
with hold(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "mine"


def file_of(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.lock")


def test_a_second_program_is_told_who_holds_it(folder: Path) -> None:
    with hold(folder) as held:
        held.check()
        with pytest.raises(LockedError) as info, hold(folder):
            pass
        message = str(info.value)
        assert "\n" not in message and str(file_of(folder)) in message
        content = json.loads(file_of(folder).read_text())
        assert f"process {content['process']} on {content['host']}" in message
    assert not list(folder.parent.iterdir())
    with hold(folder):  # free again
        pass


def test_a_killed_holder_is_no_holder(folder: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)],
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[1],
    )
    assert process.stdout is not None and process.stdout.readline() == b"held\n"
    with pytest.raises(LockedError, match="runs/mine: in use by process"), hold(folder):
        pass
    process.kill()  # not waited for: it stays as a zombie
    while process.stdout.read():
        pass
    assert file_of(folder).exists()
    with hold(folder):
        pass
    process.wait()


def test_of_many_at_once_one_holds_it(folder: Path) -> None:
    """Also where all of them find a dead one's lock first."""
    folder.parent.mkdir()
    stale = lock._identify() | {"process": 2**22 - 1, "started": "1"}
    file_of(folder).write_text(json.dumps(stale))
    inside, most = [], 0
    refused = []

    def work() -> None:
        nonlocal most
        try:
            with hold(folder):
                inside.append(1)
                most = max(most, len(inside))
                time.sleep(0.3)
                inside.pop()
        except LockedError:
            refused.append(1)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1 and len(refused) == 7


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "SILENCE", 0.9)
    monkeypatch.setattr(lock, "BEAT", 0.1)


def elsewhere(folder: Path) -> dict[str, object]:
    return lock._identify() | {"machine": "another", "host": "far-away", "process": 7}


def test_a_silent_holder_on_another_machine_is_dead(folder: Path, impatient: None) -> None:
    folder.parent.mkdir()
    file_of(folder).write_text(json.dumps(elsewhere(folder)))
    with hold(folder) as held:
        held.check()
    for damaged in ("", "[]", "{", '{"machine": 3}'):
        file_of(folder).write_text(damaged)
        with hold(folder):
            pass


def test_a_holder_on_another_machine_is_heard(
    folder: Path, impatient: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with hold(folder):  # it renews its lock; seen from elsewhere, that is all one can tell
        monkeypatch.setattr(lock, "_machine", lambda: "elsewhere")
        with pytest.raises(LockedError, match="in use by process"), hold(folder):
            pass


def test_a_folder_of_that_name(folder: Path) -> None:
    file_of(folder).mkdir(parents=True)
    with pytest.raises(LockedError, match="a folder has the name of the lock"), hold(folder):
        pass


def test_a_lock_that_was_taken_over_is_noticed(folder: Path, impatient: None) -> None:
    with hold(folder) as held:
        file_of(folder).write_text(json.dumps(elsewhere(folder)))
        with pytest.raises(LockedError, match="taken over by process 7 on far-away"):
            held.check()
    assert json.loads(file_of(folder).read_text())["host"] == "far-away"  # not ours to delete


def test_in_a_bucket(impatient: None, monkeypatch: pytest.MonkeyPatch) -> None:
    with emulate("locks"):
        folder = as_path("gs://locks/runs/mine")
        with hold(folder) as held:
            held.check()
            with pytest.raises(LockedError, match="in use by process"), hold(folder):
                pass
            monkeypatch.setattr(lock, "_machine", lambda: "elsewhere")
            with pytest.raises(LockedError, match="in use by process"), hold(folder):
                pass
        assert not as_path("gs://locks/runs/.mine.lock").exists()
