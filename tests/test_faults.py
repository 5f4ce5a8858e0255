"""What can go wrong, on every backend that can show it."""

import os
import shutil
import signal
import sys
import time

import pytest
from conftest import (
    BACKENDS,
    CLOCK,
    LIMIT,
    SCRIPT,
    Line,
    on,
    run,
    suspend,
    table,
    wait_until,
)

# What is tried where: the README's tables. A cell is tried, unless it begins with a dash.
# (In the first table, a cluster of three is one with etcd.)
FAULTS = {}
for row, etcd, *cluster, memcached, files in table("what happens"):
    cells = etcd, (cluster or [etcd])[0], memcached, files
    FAULTS[row] = [name for name, cell in zip(BACKENDS, cells) if cell[0] != "—"]
UNPROVEN = {*FAULTS}
LEASE = 5  # Seconds: short enough to wait for, long enough for a busy machine.
TROUBLE = "trouble with the backend: .*; trying again\r?\n"


def fault(row, own=False):
    """Mark a test as that of a row; with `own`, it torments its backend."""
    UNPROVEN.discard(row)
    return on(*FAULTS[row], own=own)


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
    c.sees("4. members: A, B, C\n")
    for client in a, b:
        client.sees("C joined, members: A, B, C\r?\n")
    so_far = a.transcript + b.transcript
    for client, left in (a, "A gone, members: B, C"), (b, "B gone, members: C"):
        client.hit(signal.SIGINT)
        client.sees("5. interrupted", "6. left")
        client.ends(130)
        c.sees(left)
    return so_far


@fault("Ctrl-C, SIGTERM, SIGHUP")
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


@fault("a closed terminal")
def test_closed_terminal(backend, start, member):
    """The kernel sends SIGHUP, and nothing can be written any more: the client leaves."""
    a = member("A", backend.url())
    b = start("B", backend.url(), terminal=True)
    b.sees("s to go, lease ")
    a.sees("B joined, members: A, B\n")
    b.close()
    a.sees("B gone, members: A\n")
    assert b.process.wait(LIMIT) == 129


@fault("the reader goes away (`| head -n 5`)")
def test_reader_goes_away(backend, start, member):
    """A hang-up: no message, and not a member any more."""
    a = member("A", backend.url())
    shell = '"$@" | head -n 5; exit ${PIPESTATUS[0]}'
    b = start("B", backend.url(), under=["bash", "-c", shell, "-"])
    a.sees("B joined, members: A, B\n")
    start("C", backend.url())
    b.sees("C joined, members: A, B, C\n")  # The fifth line.
    start("D", backend.url())  # Gives B something more to say.
    a.sees("B gone, members: A")
    b.ends(129)


@fault("`kill -9`")
def test_crash(backend, start):
    """A crashed client stays a member until its lease ends."""
    a, b = pair(start, backend.url(timeout=LEASE))
    b.hit(signal.SIGKILL)
    crashed = time.monotonic()
    a.sees(f"{CLOCK} B gone, members: A\n")
    # Its last heartbeat was about half a lease old at most, and servers count whole
    # seconds. A client that leaves is gone in a third of a second.
    assert time.monotonic() - crashed > LEASE / 2 - 1.5


@fault("suspended for longer than the lease, then resumed")
def test_suspended(backend, start):
    """Both sides see it: gone for the others, and back again."""
    a, b = pair(start, backend.url(timeout=LEASE))
    with backend.lock():
        suspend(b.process)
    a.sees(f"{CLOCK} B gone, members: A\n")
    # B is gone one lease after its last heartbeat, which came before its sleep.
    time.sleep(LEASE / 2 + 1)
    b.hit(signal.SIGCONT)
    b.sees("3. (joined again|still listed)\n", "4. members: A, B")
    a.sees(f"{CLOCK} B joined, members: A, B\n")
    assert "B gone" not in b.transcript
    all_is_well(start, backend.url(timeout=LEASE), a, b)


@fault("its line is cut, then healed")
def test_cut_line(backend, start, member, request):
    """A short cut costs nothing. A long one: B is gone, knows it, and comes back."""
    lease = 10
    a = member("A", backend.url(timeout=lease))
    line = Line(backend).start()
    request.addfinalizer(line.kill)
    b = start("B", line.url(timeout=lease), "--wait", "600", terminal=True)
    a.sees("B joined, members: A, B\n")
    b.sees("lease .####")
    line.pause()
    time.sleep(lease / 2 - 2)
    line.resume()
    # The lease is full again: a heartbeat has come through.
    b.sees(r"lease \[#{10}\]")
    assert "B gone" not in a.transcript
    assert "3. joined again" not in b.transcript
    line.pause()
    b.sees(TROUBLE, r"lease \[\.{10}\] is over")
    a.sees("B gone, members: A\n")
    line.resume()
    b.sees("3. joined again\r\n", "4. members: A, B\r\n")
    a.sees("B joined, members: A, B\n")
    said = all_is_well(start, backend.url(timeout=lease), a, b)
    assert [said.count(one) for one in ("trouble", "B gone", "again\r\n")] == [1, 1, 2]


@fault("the same name again, while its owner is alive")
def test_name_of_the_living(backend, group, start):
    """The second one waits for a lease, and gives up. The owner notices nothing."""
    url = backend.url(timeout=LEASE)
    a, b = pair(start, url)
    done = run("B", group, url)
    assert f"B is taken. Is its owner alive? Looking for {LEASE + 2} s\n" in done.stderr
    assert "B: its owner is alive" in done.stderr
    assert done.stdout.endswith(f"B: 2. found {group}\n")
    assert done.returncode == 1
    said = all_is_well(start, url, a, b)
    assert "B gone" not in said
    assert "3. still listed" not in said


@fault("the same name again, right after its owner crashed")
def test_name_of_the_dead(backend, start):
    """The second one joins as soon as the first one's lease has ended."""
    url = backend.url(timeout=LEASE)
    a, b = pair(start, url)
    b.hit(signal.SIGKILL)
    b = start("B", url.replace("file:", "FILE:"))  # To a URL that is the same.
    b.sees("B is taken", "1. started", "2. found", "3. joined", "4. members: A, B\n")
    all_is_well(start, url, a, b)


@on("memcached", "file")
def test_namesakes_at_once(backend, start, member):
    """Of several clients under one name, one gets in, and nobody pushes it out."""
    url = backend.url(timeout=LEASE)
    watcher = member("watcher", url)
    same = [start("same", url, "--wait", "600") for _ in range(6)]
    wait_until(lambda: sum(one.process.poll() is None for one in same) == 1)
    for one in same:
        if one.process.poll() is None:
            one.sees("4. members: same, watcher\n")
        else:
            one.ends(1)
            assert "Take another name" in one.transcript
    start("C", url)
    watcher.sees("C joined, members: C, same, watcher\n")
    assert "same gone" not in watcher.transcript


@on("memcached", own=True)
def test_signal_while_the_name_is_taken(backend, start, member):
    """Nothing is joined: it ends at once, even if the backend is mute."""
    member("A", backend.url())
    second = start("A", backend.url())
    second.sees("A is taken")
    backend.pause()
    second.hit(signal.SIGTERM)
    second.ends(143)
    backend.resume()
    start("B", backend.url()).sees("4. members: A, B\n")


# --- The backend ---


def said_once(start, url, harm, mend, joins=0):
    """Do harm, and mend it. Both clients say so once; then the truth is back."""
    a, b = pair(start, url)
    harm()
    for client in a, b:
        client.sees(TROUBLE)
    mend()
    for client in [a, b] * joins:
        client.sees("3. joined again\n")
    said = all_is_well(start, url, a, b)
    assert [said.count(one) for one in ("trouble", "3. joined again")] == [2, 2 * joins]
    assert joins or "gone" not in said


@fault("the backend restarts with its data", own=True)
def test_restart(backend, start):
    """Nobody is gone."""
    said_once(start, backend.url(timeout=10), backend.kill, backend.start)


@fault("the backend restarts without its data", own=True)
def test_restart_empty(backend, start):
    """All are thrown out, and all join again."""
    said_once(start, backend.url(timeout=10), backend.kill, backend.forget, joins=1)


@fault("the backend hangs for a few seconds, less than half a lease", own=True)
def test_hang(backend, start):
    """Nobody is gone."""
    said_once(start, backend.url(timeout=20), backend.pause, backend.resume)


@pytest.mark.parametrize("way", ["refuses", "is mute"])
@fault("the backend is gone for good", own=True)
def test_gone_for_good(backend, group, member, way):
    """Tried until the wait is over, then status 1, and no hang."""
    a = member("A", backend.url(), "--wait", "8")
    backend.kill() if way == "refuses" else backend.pause()
    a.sees(TROUBLE, "5. waited 8 s\n", f"could not leave {group}: .*; our lease")
    a.ends(1)
    assert a.transcript.count("trouble") == 1


@fault("all members wiped", own=True)
def test_wiped(backend, start):
    """Leases revoked, flush_all, files deleted: all join again."""
    a, b = pair(start, backend.url())
    backend.wipe()
    for client in a, b:
        client.sees("3. joined again\n", "4. members: ")
    all_is_well(start, backend.url(), a, b)


@fault("one node of three killed: the leader", own=True)
def test_leader_killed(backend, start):
    """Nobody is gone, and a third one can join."""
    url = backend.url(timeout=10)
    a, b = pair(start, url)
    leader, others = backend.split()
    leader.kill()
    for node in others:
        node.executors[0].wait_for(node.executors[0].after_start_check)
    said = all_is_well(start, url, a, b)
    assert "gone" not in said
    assert "3. joined again" not in said


@fault("two nodes of three killed, then back", own=True)
def test_majority_killed(backend, start):
    """Without a majority nothing is answered; with it, the group lives on."""
    url = backend.url(timeout=5)
    a, b = pair(start, url)
    leader, (other, _) = backend.split()
    leader.kill()
    other.kill()
    for client in a, b:
        client.sees(TROUBLE)
    leader.start()
    other.start()
    all_is_well(start, url, a, b)


# Fifty Pythons that load Tooz one by one would come over a quarter of a minute. So one
# loads it, and its driver, and forks: all join at once. It stays to say how they ended.
CROWD = """
import os, runpy, signal, sys
from tooz import coordination
script, names, group, url = sys.argv[1:]
coordination.get_coordinator(url, b"nobody")
for name in names.split():
    if os.fork() == 0:
        sys.argv = [script, name, group, url, "--wait", "600"]
        runpy.run_path(script, run_name="__main__")
signal.signal(signal.SIGTERM, signal.SIG_IGN)
ends = {os.waitstatus_to_exitcode(os.wait()[1]) for _ in names.split()}
sys.exit(f"they ended with {ends}" if ends != {143} else 0)
"""


@pytest.mark.alone
@fault("50 clients join together, and leave together")
def test_crowd(backend, group, member, programs):
    """All get in, the watcher sees all of them, and all get out."""
    url = backend.url(timeout=60)
    watcher = member("watcher", url, "--wait", "600")
    names = [f"c{one:02}" for one in range(50)]
    quiet = ["bash", "-c", 'exec "$@" >/dev/null', "-", sys.executable]
    crowd = programs(*quiet, "-c", CROWD, SCRIPT, " ".join(names), group, url)
    watcher.sees("members: " + ", ".join([*names, "watcher"]) + "\n")
    crowd.hit(signal.SIGTERM)
    watcher.sees("gone, members: watcher\n")
    crowd.ends(0)


# --- Ways to end that no table needs ---


@on("memcached", own=True)
def test_second_ctrl_c_kills(backend, member):
    """While leaving is stuck, a second Ctrl-C ends it at once, without a traceback."""
    a = member("A", backend.url())
    backend.pause()
    a.hit(signal.SIGINT)
    a.sees("5. interrupted")
    interrupted = time.monotonic()
    time.sleep(0.5)  # Sooner, it would be taken for a part of the first.
    a.hit(signal.SIGINT)
    a.ends(-signal.SIGINT)
    assert time.monotonic() - interrupted < 9  # Else it gave up by itself.


@on("memcached", own=True)
def test_signal_while_suspended(backend, member):
    """Resumed after its wait, with a signal on its way: it leaves, for either reason."""
    a = member("A", backend.url(timeout=5), "--wait", "3")
    suspend(a.process)
    a.hit(signal.SIGHUP)
    time.sleep(4)
    a.hit(signal.SIGCONT)
    a.sees("6. left")
    a.ends(129, 0)


@on("memcached", own=True)
def test_terminal_and_backend_gone(backend, tmp_path, group, start):
    """Where stderr goes to a file, the trouble is told there, in plain text."""
    errors = tmp_path / "errors"
    under = ["bash", "-c", f'exec "$@" 2>{errors}', "-"]
    a = start("A", backend.url(), under=under, terminal=True)
    a.sees("4. members: A", "s to go")
    backend.pause()
    wait_until(lambda: "no answer; trying again\n" in errors.read_text())
    a.close()
    assert a.process.wait(LIMIT) == 1
    assert f"A: could not leave {group}: no answer" in errors.read_text()
    assert "\x1b" not in errors.read_text()


@on("file")
def test_two_signals_in_a_row(backend, start, member):
    """The second one is not heard, whichever it is. (The two may swap on the way.)"""
    a = member("A", backend.url())
    term, hup, interrupt = signal.SIGTERM, signal.SIGHUP, signal.SIGINT
    for first, second in (term, term), (hup, term), (interrupt, interrupt):
        b = start("B", backend.url())
        a.sees("B joined")
        b.hit(first)
        b.hit(second)
        b.sees("B: 6. left")
        a.sees("B gone")
        b.ends(128 + first, 128 + second)


# A signal in Python's own queue, between the putting of an item and the counting of it.
AIMED = """
import os, queue, signal
put, items = queue.Queue._put, []
def _put(self, item):
    put(self, item)
    items.append(item)
    if len(items) == 6:
        os.kill(os.getpid(), signal.SIGTERM)
queue.Queue._put = _put
"""


@on("file")
def test_signal_in_a_call_of_tooz(backend, start, tmp_path, monkeypatch):
    """Its worker thread fails then: a look is done that was not counted. We still leave."""
    (tmp_path / "sitecustomize.py").write_text(AIMED)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    a = start("A", backend.url())
    a.sees("4. members: A\n", "5. interrupted\n", "6. left")
    a.ends(143)


@on("file")
def test_nohup(backend, start, member):
    """nohup has SIGHUP ignored, and that stays so, even if nobody reads any more."""
    a = member("A", backend.url(), "--wait", "600")
    b = start("B", backend.url(), "--wait", "5", under=["nohup"])
    b.sees("4. members: A, B\n")
    b.hit(signal.SIGHUP)
    b.close()
    start("C", backend.url())  # Gives B something to say.
    a.sees("C joined, members: A, B, C", "B gone, members: A, C")
    assert b.process.wait(LIMIT) == 0


@on("file")
def test_reads_work_and_writes_fail(backend, member):
    """Thrown out, and unable to join again: said once, not at every try."""
    a = member("A", backend.url(), "--wait", "8")
    shutil.rmtree(backend.folder)
    a.sees(TROUBLE, "5. waited 8 s\n")
    a.ends(0)
    assert a.transcript.count("trouble") == 1


@pytest.mark.parametrize(
    ("shell", "status"),
    [
        ('"$@" >&-', 0),  # Nobody reads: the client takes its steps all the same.
        ('trap "" ALRM; exec "$@"', 0),  # The alarm is ignored: the wait ends, too.
        ('"$@" >/dev/full', 129),  # A full disk counts as a hang-up. Only Linux has it.
    ][: 3 if os.path.exists("/dev/full") else 2],
)
@on("file")
def test_odd_start(backend, start, member, shell, status):
    """Whoever starts it may have an odd idea of its output, or of signals."""
    member("A", backend.url(), "--wait", "600")
    b = start("B", backend.url(), "--wait", "2", under=["bash", "-c", shell, "-"])
    b.ends(status)
    start("C", backend.url()).sees("4. members: A, C\n")
