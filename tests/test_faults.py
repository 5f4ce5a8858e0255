"""What can go wrong: what it does, on every backend that can show it."""

import shutil
import signal
import time

import pytest
from conftest import BACKENDS, CLOCK, GROUP, broken, on, run, suspend, wait_until

LEASE = 5  # Seconds: short enough to wait for, long enough for a busy machine.
OUTAGE = "backend error: [A-Z].*: .*; still trying\n"
EXPIRY = "our lease may have expired: stop acting as a member"
ROWS = []  # Of the README's table: test_readme.py compares them, word for word.


def promises(row, cell, *names):
    """Run a test on these backends, or on all; a row of the README's table says the same."""
    names = names or [*BACKENDS]
    ROWS.append([row, *(cell if name in names else "n/a" for name in BACKENDS)])
    return on(*names)


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
        client.sees("members: A, B, C\n")
    so_far = a.transcript, b.transcript
    for client, left in (a, "A gone, members: B, C"), (b, "B gone, members: C"):
        client.hit(signal.SIGINT)
        client.sees("5. interrupted", "6. left")
        client.ends(130)
        c.sees(left)
    return so_far


@promises("Ctrl-C, SIGTERM, a closed terminal", "gone at once")
def test_signal(backend, start, member):
    """The client leaves, the other sees it, the status says why."""
    a = member("A", backend.url())
    for number in signal.SIGINT, signal.SIGTERM, signal.SIGHUP:
        b = start("B", backend.url())
        a.sees("B joined, members: A, B\n")
        b.sees("4. members: A, B\n")
        b.hit(number)
        b.sees("B: 5. interrupted\n", "B: 6. leaving", f"B: 6. left {GROUP}\n")
        a.sees(f"{CLOCK} B gone, members: A\n")
        b.ends(128 + number)
    # The kernel sends SIGHUP, and nothing can be written any more.
    b = start("B", backend.url(), terminal=True)
    b.sees("s remaining, heartbeats")
    a.sees("B joined, members: A, B\n")
    b.ptyproc.fileobj.close()
    a.sees("B gone, members: A\n")
    wait_until(lambda: not b.isalive())
    assert b.exitstatus == 129


@promises("`kill -9`", "gone later")
def test_crash(backend, start):
    """A crashed client stays a member until its lease expires."""
    a, b = pair(start, backend.url(timeout=LEASE))
    b.hit(signal.SIGKILL)
    crashed = time.monotonic()
    a.sees(f"{CLOCK} B gone, members: A\n")
    # Its last heartbeat was half a lease old at most, and servers count whole seconds.
    assert time.monotonic() - crashed > LEASE / 2 - 1.5


@promises("suspended for longer than its lease", "joins again")
def test_suspended(backend, start):
    """The others see it gone, and back. It is told first of all."""
    a, b = pair(start, backend.url(timeout=LEASE))
    with backend.lock():
        suspend(b)
    a.sees(f"{CLOCK} B gone, members: A\n")
    known = len(b.transcript)
    b.hit(signal.SIGCONT)
    a.sees(f"{CLOCK} B joined, members: A, B\n")
    b.sees(f"{CLOCK} B joined, members: A, B\n")
    _, said = all_is_well(start, backend.url(timeout=LEASE), a, b)
    # A poll that was under way tells as much.
    first = said[known:].splitlines()[0]
    assert first.endswith((EXPIRY, "B gone, members: A", "still trying"))


@promises("a second client with the same name", "refused")
def test_name_of_the_living(backend, start):
    """The second one is refused at once. The first one notices nothing."""
    a, b = pair(start, backend.url(timeout=60))
    done = run("B", GROUP, backend.url(timeout=60))
    assert (done.stdout, done.returncode) == ("", 1)
    assert done.stderr == (
        f"B: B is a member of {GROUP} already: it is running, or it crashed less than a "
        "lease ago. Try again then, or choose another name\n"
    )
    for said in all_is_well(start, backend.url(timeout=60), a, b):
        assert " gone" not in said


@promises("the same, after the first one crashed", "refused, free later")
def test_name_of_the_dead(backend, member):
    """The name is free when the lease has expired, although nobody else polls."""
    url = backend.url(timeout=LEASE)
    member("A", url).hit(signal.SIGKILL)
    assert run("A", GROUP, url).returncode == 1
    # Another spelling of the same URL.
    again = ["A", GROUP, url.replace("file:", "FILE:"), "--wait", "0"]
    wait_until(lambda: run(*again).returncode == 0)


# --- The backend ---


def outage(start, url, harm, mend):
    """Do harm, and mend it: both clients say so, once, and then the list is true again.

    Return what they have said.
    """
    a, b = pair(start, url)
    harm()
    for client in a, b:
        client.sees(f"{CLOCK} {OUTAGE}")
    mend()
    for client in a, b:
        client.sees(f"{CLOCK} backend is back, members: ")
    both = all_is_well(start, url, a, b)
    for said in both:
        assert [said.count(one) for one in ("error", "is back")] == [1, 1]
    return "".join(both)


@promises("the backend restarts with its data", "nobody gone", "etcd")
def test_restart(backend, start):
    """etcd renews all leases."""
    said = outage(start, backend.url(timeout=20), backend.kill, backend.start)
    assert " gone" not in said


@promises("the backend restarts without data", "all join again", "etcd", "memcached")
def test_restart_empty(backend, start):
    """Soon, and not again and again."""
    said = outage(start, backend.url(timeout=20), backend.kill, backend.forget)
    assert 1 <= said.count("A joined") <= 4


@promises("a hang shorter than half a lease", "nobody gone", "etcd", "memcached")
def test_short_hang(backend, start):
    """A poll gives up long before that."""
    said = outage(start, backend.url(timeout=20), backend.pause, backend.resume)
    assert " gone" not in said and EXPIRY not in said


@promises("the backend stays down", "tried until the wait ends", "etcd", "memcached")
@pytest.mark.parametrize("way", ["refuses", "hangs"])
def test_stays_down(backend, member, way):
    """The expiry is told within a lease, once, and the wait ends although nothing answers."""
    a = member("A", backend.url(timeout=20), "--wait", "16")
    backend.kill() if way == "refuses" else backend.pause()
    down = time.monotonic()
    a.sees(OUTAGE, f"{EXPIRY}\n")
    assert time.monotonic() - down < 20
    a.sees("5. waited 16 s\n", f"6. leaving {GROUP}\n")
    assert time.monotonic() - down < 25
    a.sees(f"could not leave {GROUP}: .*; our lease will expire\n")
    a.ends(1)
    assert [a.transcript.count(one) for one in ("error", EXPIRY)] == [1, 1]


@promises("the group, or all its members, are deleted", "all join again")
@pytest.mark.parametrize("what", ["the group", "all its members"])
def test_deleted(backend, start, what):
    """It is listed again in a few lines."""
    a, b = pair(start, backend.url())
    with backend.lock():
        suspend(b)  # Or it may mend the group before A has noticed.
    backend.delete(what)
    a.sees("A gone, members: .none.\n", "A joined, members: A")
    b.hit(signal.SIGCONT)
    a.sees("B joined, members: A, B\n")
    for said in all_is_well(start, backend.url(), a, b):
        assert "error" not in said
        assert len(said.splitlines()) <= 16


@promises("20 clients join and leave at once", "all seen")
def test_crowd(backend, member, start):
    """All get in, the watcher sees all of them, and all get out."""
    url = backend.url(timeout=60)
    watcher = member("watcher", url, "--wait", "600")
    names = [f"c{one:02}" for one in range(20)]
    crowd = [start(name, url, "--wait", "600") for name in names]
    watcher.sees("members: " + ", ".join([*names, "watcher"]) + "\n")
    for one in crowd:
        one.hit(signal.SIGTERM)
    watcher.sees("gone, members: watcher\n")
    for one in crowd:
        one.ends(143)


# --- Ways to end that no table needs ---


@pytest.mark.parametrize(
    ("line", "status"),
    [("members = coordinator", 1), ("found = poll", 0), ("for who in sorted", 1)],
)
@on("memcached")
def test_mistake_of_a_learner(backend, start, tmp_path, line, status):
    """A name misspelt in step 4 or 5 is told as what it is; what was joined is left."""
    words = line.rpartition(" ")[0]
    typo = broken(tmp_path, line, f"{words} typo")
    a = start("A", backend.url(), "--wait", "1", script=typo)
    a.ends(status)
    assert "NameError: name 'typo' is not defined" in a.transcript
    start("B", backend.url()).sees("4. members: B\n")


def leaving(member, backend):
    """Return a client that leaves, while the backend hangs."""
    a = member("A", backend.url())
    backend.pause()
    a.hit(signal.SIGTERM)
    a.sees("5. interrupted", "6. leaving")
    return a


@on("memcached")
def test_leave_hangs(backend, member):
    """It gives up long before the URL's 30 s."""
    a = leaving(member, backend)
    a.sees("could not leave .*: TimeoutError: no answer; our lease will expire\n")
    a.ends(1)


@on("memcached")
def test_second_signal(backend, member):
    """SIGTERM waits for the leave."""
    a = leaving(member, backend)
    a.hit(signal.SIGTERM)
    backend.resume()
    a.sees("6. left")
    a.ends(143)


@on("memcached")
def test_second_ctrl_c(backend, member):
    """It kills at once."""
    a = leaving(member, backend)
    a.hit(signal.SIGINT)
    a.ends(-signal.SIGINT)


@on("files")
def test_ignored_signal(backend, member):
    """A Ctrl-C that is ignored stays ignored, also after another signal was caught."""
    ignoring = ["bash", "-c", 'trap "" INT; exec "$@"', "-"]
    a = member("A", backend.url(), under=ignoring)
    a.hit(signal.SIGINT)
    with backend.lock():  # The leave has to wait for it.
        a.hit(signal.SIGTERM)
        a.sees("6. leaving")
        a.hit(signal.SIGINT)
    a.sees("6. left")
    a.ends(143)


@on("files")
def test_signal_during_the_join(backend, start, tmp_path):
    """It is handled once we have joined: we leave."""
    itself = broken(tmp_path, "# 3. From", "os.kill(os.getpid(), signal.SIGTERM)  #")
    a = start("A", backend.url(), script=itself)
    a.sees("3. joined", "4. members: A\n", "5. interrupted\n", "6. left")
    a.ends(143)


@on("files")
def test_lock_is_held(backend, start):
    """Somebody holds the lock of the files: it gives up, and nothing is joined."""
    run("A", GROUP, backend.url(), "--wait", "0")
    with backend.lock():
        b = start("B", backend.url())
        b.sees("cannot use .*: TimeoutError: no answer\n")
        b.ends(1)


@pytest.mark.parametrize(("under", "status"), [("", 129), ("nohup ", 0)])
@on("files")
def test_reader_goes_away(backend, start, member, under, status):
    """That is a hang-up: it leaves. Under nohup it stays until its wait ends."""
    a = member("A", backend.url(), "--wait", "600")
    pipe = ["bash", "-c", f'{under}"$@" | sed 4q; exit $PIPESTATUS', "-"]
    b = start("B", backend.url(), "--wait", "20", under=pipe)
    b.sees("4. members: A, B\n")
    start("C", backend.url())  # Gives B something to say.
    a.sees("B gone, members: A, C")
    b.ends(status)


@on("files")
def test_folder_deleted(backend, member):
    """The whole of it, which only start() makes: an error, said once."""
    a = member("A", backend.url(), "--wait", "5")
    shutil.rmtree(backend.folder)
    a.sees(OUTAGE, "5. waited 5 s\n")
    a.ends(0)
    assert a.transcript.count("error") == 1
