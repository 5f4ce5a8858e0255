"""What can go wrong, on every backend that can show it."""

import re
import shutil
import signal
import time

import pytest
from conftest import (
    BACKENDS,
    CLOCK,
    GROUP,
    LIMIT,
    Connection,
    on,
    run,
    suspend,
    table,
    wait_until,
)

# What is tried where: the README's table. A cell is tried unless it says "n/a".
FAULTS = {
    row: [name for name, cell in zip(BACKENDS, cells) if cell != "n/a"]
    for row, *cells in table("what happens")
}
UNTRIED = {*FAULTS}
LEASE = 5  # Seconds: short enough to wait for, long enough for a busy machine.
OUTAGE = r"backend error: \w+: .*; still trying\r?\n"


def fault(row):
    """Mark a test as that of a row."""
    UNTRIED.discard(row)
    return on(*FAULTS[row])


def pair(start, url):
    """Return two clients, which see each other."""
    a, b = (start(name, url, "--wait", "600") for name in "AB")
    for client in a, b:
        client.sees("members: A, B\n")
    return a, b


def all_is_well(start, url, a, b):
    """Prove it, and return what A and B have said until then.

    A third client joins: all three must show all three. Then A and B leave.
    """
    c = start("C", url)
    c.sees("members: A, B, C\n")
    for client in a, b:
        client.sees("C joined, members: A, B, C\r?\n")
    so_far = a.transcript + b.transcript
    for client, left in (a, "A gone, members: B, C"), (b, "B gone, members: C"):
        client.hit(signal.SIGINT)
        client.sees("5. interrupted", "6. left")
        client.ends(130)
        c.sees(left)
    # Of itself a client tells only that it joined again.
    assert not re.search(rf"([AB]): {CLOCK} \1 ", so_far)
    return so_far


@fault("Ctrl-C, SIGTERM, a closed terminal")
def test_signal(backend, start, member):
    """The client leaves, the other sees it, the status says why."""
    a = member("A", backend.url())
    for number in signal.SIGINT, signal.SIGTERM, signal.SIGHUP:
        b = start("B", backend.url())
        a.sees("B joined, members: A, B\n")
        b.sees("4. members: A, B\n")
        b.hit(number)
        b.sees("B: 5. interrupted\n", "B: 6. left .* and stopped\n")
        a.sees(f"{CLOCK} B gone, members: A\n")
        b.ends(128 + number)
        assert "\x1b" not in b.transcript
    # The kernel sends SIGHUP, and nothing can be written any more.
    b = start("B", backend.url(), terminal=True)
    b.sees("s remaining, lease ")
    a.sees("B joined, members: A, B\n")
    b.close()
    a.sees("B gone, members: A\n")
    assert b.process.wait(LIMIT) == 129


@fault("`kill -9`")
def test_crash(backend, start):
    """A crashed client stays a member until its lease expires."""
    a, b = pair(start, backend.url(timeout=LEASE))
    b.hit(signal.SIGKILL)
    crashed = time.monotonic()
    a.sees(f"{CLOCK} B gone, members: A\n")
    # Its last heartbeat was half a lease old at most, and servers count whole seconds.
    assert time.monotonic() - crashed > LEASE / 2 - 1.5


@fault("suspended for longer than its lease")
def test_suspended(backend, start):
    """Both sides see it: gone for the others, and back again."""
    a, b = pair(start, backend.url(timeout=LEASE))
    with backend.lock():
        suspend(b.process)
    a.sees(f"{CLOCK} B gone, members: A\n")
    b.hit(signal.SIGCONT)
    a.sees(f"{CLOCK} B joined, members: A, B\n")
    # On files the next heartbeat may bring it back before it has noticed.
    if backend.port:
        b.sees("3. joined again\n", "4. members: A, B")
    all_is_well(start, backend.url(timeout=LEASE), a, b)


@fault("cut off for longer than its lease")
def test_cut_connection(backend, start, member, request):
    """B is gone, knows it, and comes back."""
    a = member("A", backend.url(timeout=LEASE))
    connection = Connection(backend).start()
    request.addfinalizer(connection.kill)
    b = start("B", connection.url(timeout=LEASE), "--wait", "600", terminal=True)
    a.sees("B joined, members: A, B\n")
    b.sees("lease .#")
    connection.pause()
    b.sees(OUTAGE, r"lease \[\.{10}\] expired")
    a.sees("B gone, members: A\n")
    connection.resume()
    b.sees("backend is back, ", "3. joined again\r\n", "4. members: A, B\r\n")
    a.sees("B joined, members: A, B\n")
    said = all_is_well(start, backend.url(timeout=LEASE), a, b)
    assert [said.count(one) for one in ("error", "B gone", "again\r\n")] == [1, 1, 1]


@fault("a second client with the same name")
def test_name_of_the_living(backend, start):
    """The second one waits for a lease, and gives up. The first one notices nothing."""
    url = backend.url(timeout=LEASE)
    a, b = pair(start, url)
    done = run("B", GROUP, url)
    assert f"B is taken; waiting up to {LEASE + 2} s" in done.stderr
    assert done.stderr.endswith("B: B is still taken: choose another name\n")
    assert done.stdout.endswith(f"B: 2. {GROUP} exists already\n")
    assert done.returncode == 1
    second = start("B", url)
    second.sees("B is taken")
    second.hit(signal.SIGINT)  # Nothing is joined: it ends at once.
    second.ends(-signal.SIGINT)
    said = all_is_well(start, url, a, b)
    assert "B gone" not in said
    assert "3. joined again" not in said


@fault("the same, after the first one crashed")
def test_name_of_the_dead(backend, start):
    """The second one joins as soon as the first one's lease has expired."""
    url = backend.url(timeout=LEASE)
    a, b = pair(start, url)
    b.hit(signal.SIGKILL)
    b = start("B", url.replace("file:", "FILE:"))  # Another spelling of the same URL.
    b.sees(
        "B is taken", "1. started", "2. .* exists", "3. joined", "4. members: A, B\n"
    )
    all_is_well(start, url, a, b)


@on("memcached", "file")
def test_one_name_at_once(backend, start, member):
    """Of several clients under one name, one gets in, and nobody removes it."""
    url = backend.url(timeout=LEASE)
    watcher = member("watcher", url)
    same = [start("same", url, "--wait", "600") for _ in range(6)]
    wait_until(lambda: sum(one.process.poll() is None for one in same) == 1)
    start("C", url)
    watcher.sees("C joined, members: C, same, watcher\n")
    assert "same gone" not in watcher.transcript


# --- The backend ---


def said_once(start, url, harm, mend, joins=(0,)):
    """Do harm, and mend it. Both clients say so, once; then the list is true again.

    Each of them has joined again so many times.
    """
    a, b = pair(start, url)
    harm()
    for client in a, b:
        client.sees(OUTAGE)
    mend()
    for client in a, b:
        client.sees("backend is back, members: ")
    said = all_is_well(start, url, a, b)
    assert [said.count(one) for one in ("error", "is back")] == [2, 2]
    for client in a, b:
        assert client.transcript.count("3. joined again") in joins
    assert joins != (0,) or " gone" not in said


@fault("the backend restarts with its data")
def test_restart(backend, start):
    """Nobody is gone."""
    said_once(start, backend.url(timeout=10), backend.kill, backend.start)


@fault("the backend restarts without its data")
def test_restart_empty(backend, start):
    """All are removed, and all join again: soon, and not again and again."""
    said_once(start, backend.url(timeout=10), backend.kill, backend.forget, (1, 2))


@fault("the backend hangs for less than half a lease")
def test_hang(backend, start):
    """Nobody is gone."""
    said_once(start, backend.url(timeout=20), backend.pause, backend.resume)


@pytest.mark.parametrize("way", ["refuses", "hangs"])
@fault("the backend stays down")
def test_stays_down(backend, member, way):
    """Tried until the wait ends, then status 1."""
    a = member("A", backend.url(), "--wait", "8")
    backend.kill() if way == "refuses" else backend.pause()
    a.sees(OUTAGE, "5. waited 8 s\n", f"could not leave {GROUP}: .*; our lease will")
    a.ends(1)
    assert a.transcript.count("error") == 1


@fault("all members are deleted")
def test_deleted(backend, start):
    """Leases revoked, flush_all, files deleted: all join again, twice at most."""
    a, b = pair(start, backend.url())
    backend.wipe()
    for client in a, b:
        client.sees("3. joined again\n", "4. members: ")
    assert "error" not in all_is_well(start, backend.url(), a, b)
    for client in a, b:
        assert client.transcript.count("3. joined again") <= 2


@fault("the leader is killed")
def test_leader_killed(backend, start):
    """Nobody is gone, and a third one can join."""
    url = backend.url(timeout=10)
    a, b = pair(start, url)
    leader, others = backend.split()
    leader.kill()
    for node in others:
        node.executors[0].wait_for(node.executors[0].after_start_check)
    said = all_is_well(start, url, a, b)
    assert " gone" not in said
    assert "3. joined again" not in said


@fault("two of three are killed, then restarted")
def test_majority_killed(backend, start):
    """Without a majority nothing is answered; with it the group lives on."""
    leader, (other, _) = backend.split()
    said_once(
        start,
        backend.url(timeout=5),
        lambda: (leader.kill(), other.kill()),
        lambda: (leader.start(), other.start()),
        joins=(0, 1, 2),
    )


@pytest.mark.alone
@fault("50 clients join and leave at once")
def test_crowd(backend, member, start):
    """All get in, the watcher sees all of them, and all get out."""
    url = backend.url(timeout=60)
    watcher = member("watcher", url, "--wait", "600")
    names = [f"c{one:02}" for one in range(50)]
    crowd = [start(name, url, "--wait", "600") for name in names]
    watcher.sees("members: " + ", ".join([*names, "watcher"]) + "\n")
    for one in crowd:
        one.hit(signal.SIGTERM)
    watcher.sees("gone, members: watcher\n")
    for one in crowd:
        one.ends(143)


# --- Ways to end that no table needs ---


@on("memcached")
def test_signal_during_an_outage(backend, tmp_path, start):
    """It gives up long before the URL's 30 s; stderr, in a file, has plain text."""
    errors = tmp_path / "errors"
    under = ["bash", "-c", f'exec "$@" 2>{errors}', "-"]
    a = start("A", backend.url(), under=under, terminal=True)
    a.sees("4. members: A", "s remaining")
    backend.pause()
    wait_until(lambda: errors.exists() and "still trying\n" in errors.read_text())
    a.hit(signal.SIGTERM)
    began = time.monotonic()
    a.ends(1)
    assert time.monotonic() - began < 25
    no_answer = "TimeoutError: no answer"
    assert errors.read_text() == (
        f"A: backend error: {no_answer}; still trying\n"
        f"A: could not leave {GROUP}: {no_answer}; our lease will expire\n"
    )


@on("file")
def test_signal_during_the_join(backend, member, start):
    """Somebody holds the lock of the files: the join gives up, and nothing is joined."""
    a = member("A", backend.url())
    with backend.lock():
        b = start("B", backend.url())
        b.sees("2. .* exists already\n")
        b.hit(signal.SIGTERM)
        b.sees("cannot use .*: TimeoutError: no answer\n")
        b.ends(1)
    start("C", backend.url())
    a.sees("backend is back", "C joined, members: A, C\n")


@on("memcached")
def test_second_ctrl_c_kills(backend, member):
    """While the leave hangs, a second Ctrl-C ends it at once, without a traceback."""
    a = member("A", backend.url())
    backend.pause()
    a.hit(signal.SIGTERM)
    a.sees("5. interrupted")
    a.hit(signal.SIGTERM)  # Only Ctrl-C kills.
    a.hit(signal.SIGINT)
    a.ends(-signal.SIGINT)


@pytest.mark.parametrize(("under", "status"), [([], 129), (["nohup"], 0)])
@on("file")
def test_reader_goes_away(backend, start, member, under, status):
    """That is a hang-up: it leaves. Under nohup it stays until its wait ends."""
    a = member("A", backend.url(), "--wait", "600")
    b = start("B", backend.url(), "--wait", "8", under=under)
    b.sees("4. members: A, B\n")
    b.close()
    start("C", backend.url())  # Gives B something to say.
    a.sees("B gone, members: A, C")
    assert b.process.wait(LIMIT) == status


@on("file")
def test_folder_deleted(backend, start, member):
    """A group survives that `groups` is deleted, but not its `tmp`: said once."""
    a = member("A", backend.url(), "--wait", "15")
    shutil.rmtree(backend.folder / "groups")
    a.sees("3. joined again\n", "4. members: A\n")
    shutil.rmtree(backend.folder)
    a.sees(OUTAGE, "5. waited 15 s\n")
    a.ends(0)
    assert a.transcript.count("error") == 1


@on("file")
def test_no_stdout(backend, start):
    """A client takes its steps although there is nowhere to print."""
    under = ["bash", "-c", '"$@" >&-', "-"]
    start("B", backend.url(), "--wait", "1", under=under).ends(0)
