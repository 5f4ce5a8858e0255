"""What can go wrong, on every backend that can show it.

Each test proves the cells of one row of the README's table "What you will see";
test_readme.py holds the two together.
"""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pexpect
import pytest
from conftest import (
    BACKENDS,
    CLOCK,
    LIMIT,
    SCRIPT,
    TerminalClient,
    command,
    own,
    run,
    wait_until,
)
from tooz import coordination

ALL = ["etcd", "cluster", "memcached", "file"]
SERVERS = ["etcd", "cluster", "memcached"]
LEASE = 5  # Seconds: short enough to wait for, long enough for a busy machine.
ROWS = {}  # The rows of the README's table: the backends that tests prove them on.


def fault(row, backends, fixture="backend"):
    """Mark a test as the proof of a row of the table, on these backends."""
    ROWS.setdefault(row, set()).update(backends)
    return pytest.mark.parametrize(fixture, backends, indirect=True)


def pair(start, group, url, *options):
    """Return two clients that see each other."""
    a = start("A", group, url, *options)
    a.sees("4. members: A\n")
    b = start("B", group, url, *options)
    b.sees("4. members: A, B\n")
    a.sees(f"A: {CLOCK} B joined, members: A, B\n")
    return a, b


def both_answer(start, group, url, a, b):
    """A third client joins: all three must show all three. Then let A and B go."""
    c = start("C", group, url)
    c.sees("4. members: A, B, C\n")
    for client in a, b:
        client.sees("C joined, members: A, B, C\n")
    so_far = a.transcript + b.transcript
    for client in a, b:
        client.hit(signal.SIGINT)
    for client in a, b:
        client.sees(f"6. left {group} and stopped\n")
        client.ends(130)
    return so_far


def said_once(client):
    """Trouble is said once, and so is its end, and so on: a busy machine makes more."""
    said = re.findall("trying for another|answers again", client.transcript)
    assert said == (["trying for another", "answers again"] * len(said))[: len(said)]


# --- Ways to end ---


@fault("Ctrl-C, SIGTERM, SIGHUP", ALL)
def test_signal(backend, group, start):
    """The client leaves, the other sees it, the status says why."""
    a = start("A", group, backend.url())
    a.sees("4. members: A\n")
    for number, status in (
        (signal.SIGINT, 130),
        (signal.SIGTERM, 143),
        (signal.SIGHUP, 129),
    ):
        b = start("B", group, backend.url())
        a.sees(f"{CLOCK} B joined, members: A, B\n")
        b.sees("4. members: A, B\n")
        b.hit(number)
        b.sees(f"B: 6. left {group} and stopped\n")
        a.sees(f"{CLOCK} B gone, members: A\n")
        b.ends(status)
        assert "5. waited" not in b.transcript


@fault("a closed terminal", ALL)
def test_closed_terminal(backend, group, start):
    """The kernel sends SIGHUP, and nothing can be written any more: the client leaves."""
    a = start("A", group, backend.url())
    a.sees("4. members: A\n")
    b = start("B", group, backend.url(), kind=TerminalClient)
    b.sees("heartbeats sent: ")
    a.sees("B joined, members: A, B\n")
    b.ptyproc.fileobj.close()
    a.sees("B gone, members: A\n")
    b.wait()
    assert b.exitstatus == 129


@fault("the reader goes away (`| head -n 5`)", ALL)
def test_reader_goes_away(backend, group, start):
    """Quietly: no message, status 0, and not a member any more."""
    a = start("A", group, backend.url())
    a.sees("4. members: A\n")
    pipe = subprocess.Popen(
        ["bash", "-c", '"$@" | head -n 5; exit ${PIPESTATUS[0]}', "-"]
        + command("B", group, backend.url()),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    a.sees("B joined, members: A, B\n")
    start("C", group, backend.url())  # Gives B something to say.
    a.sees("B gone, members: A")
    output, _ = pipe.communicate(timeout=LIMIT)
    assert pipe.returncode == 0
    assert output.splitlines()[-1] == "B: 4. members: A, B"


@fault("`kill -9`", ALL)
def test_crash(backend, group, start):
    """A crashed client stays a member until its lease ends."""
    a, b = pair(start, group, backend.url(timeout=LEASE))
    b.hit(signal.SIGKILL)
    crashed = time.monotonic()
    a.sees(f"{CLOCK} B gone, members: A\n")
    # Its last heartbeat was about half a lease old at most, and servers count whole
    # seconds. A client that leaves is gone in a third of a second.
    assert time.monotonic() - crashed > LEASE / 2 - 1.5


# --- Silence ---


@fault("suspended for longer than the lease, then resumed", ALL)
def test_suspended(backend, group, start):
    """Both sides see it: gone for the others, and back again."""
    a, b = pair(start, group, backend.url(timeout=LEASE))
    b.hit(signal.SIGSTOP)
    stopped = time.monotonic()
    a.sees(f"{CLOCK} B gone, members: A\n")
    # B is gone one lease after its last heartbeat, which came before its sleep.
    wait_until(lambda: time.monotonic() - stopped > LEASE + 1)
    b.hit(signal.SIGCONT)
    b.sees(
        "Joining again\n",
        f"2. found {group}\n",
        "3. (joined|still in)",
        "4. members: A, B",
    )
    a.sees(f"{CLOCK} B joined, members: A, B\n")
    b.hit(signal.SIGTERM)
    b.ends(143)
    a.sees("B gone, members: A\n")


# --- One name twice ---


@fault("the same name again, while its owner is alive", ALL)
def test_name_of_the_living(backend, group, start):
    """The second one waits for a lease, and gives up. The owner notices nothing."""
    a, b = pair(start, group, backend.url(timeout=LEASE))
    done = run("B", group, backend.url(timeout=LEASE))
    assert "B: the name B is taken: its owner is alive, or crashed\n" in done.stderr
    assert f"B: looking for up to {LEASE + 2} s" in done.stderr
    assert "B: its owner is alive" in done.stderr
    assert (done.stdout, done.returncode) == ("", 1)
    start("C", group, backend.url(timeout=LEASE))
    a.sees("C joined, members: A, B, C\n")
    for client in a, b:
        assert "B gone" not in client.transcript
        assert "Joining again" not in client.transcript


@fault("the same name again, right after its owner crashed", ALL)
def test_name_of_the_dead(backend, group, start):
    """The second one joins as soon as the first one's lease has ended."""
    a, b = pair(start, group, backend.url(timeout=LEASE))
    b.hit(signal.SIGKILL)
    b = start("B", group, backend.url(timeout=LEASE))
    b.sees("3. joined", "4. members: A, B\n")
    b.hit(signal.SIGINT)
    b.ends(130)
    a.sees("B gone, members: A\n")


@pytest.mark.parametrize("backend", ["memcached", "file"], indirect=True)
def test_namesakes_at_once(backend, group, start):
    """Of several clients under one name, one gets in, and nobody pushes it out."""
    url = backend.url(timeout=LEASE)
    watcher = start("watcher", group, url)
    watcher.sees("4. members: watcher\n")
    same = [start("same", group, url, "--wait", "600") for _ in range(6)]
    wait_until(lambda: sum(one.proc.poll() is None for one in same) == 1)
    for one in same:
        if one.proc.poll() is None:
            one.sees("4. members: same, watcher\n")
        else:
            one.ends(1)
            assert "Take another name" in one.transcript
    start("C", group, url)
    watcher.sees("C joined, members: C, same, watcher\n")
    assert "same gone" not in watcher.transcript


# --- The backend ---


@fault("the backend restarts with its data", ["etcd", "cluster"], "own_backend")
def test_restart(own_backend, group, start):
    """Said once, over once; nobody is gone."""
    url = own_backend.url(timeout=10)
    a, b = pair(start, group, url)
    own_backend.kill()
    for client in a, b:
        client.sees(f"{re.escape(url)}: .*; trying for another \\d+ s\n")
    own_backend.start()
    for client in a, b:
        client.sees("answers again\n")
    assert "gone" not in both_answer(start, group, url, a, b)
    said_once(a)
    said_once(b)


@fault("the backend restarts without its data", SERVERS, "own_backend")
def test_restart_empty(own_backend, group, start):
    """All are thrown out, and all join again."""
    url = own_backend.url(timeout=10)
    a, b = pair(start, group, url)
    own_backend.kill()
    for client in a, b:
        client.sees("; trying for another")
    own_backend.forget()
    for client in a, b:
        client.sees("answers again\n", "Joining again\n", "3. joined")
    both_answer(start, group, url, a, b)


@fault(
    "the backend hangs for a few seconds, less than half a lease",
    SERVERS,
    "own_backend",
)
def test_hang(own_backend, group, start):
    """Said once, over once; nobody is gone."""
    url = own_backend.url(timeout=20)
    a, b = pair(start, group, url)
    own_backend.pause()
    for client in a, b:
        client.sees(": no answer; trying for another")
    own_backend.resume()
    for client in a, b:
        client.sees("answers again\n")
    assert "gone" not in both_answer(start, group, url, a, b)
    said_once(a)
    said_once(b)


@pytest.mark.parametrize("way", ["refuses", "is mute"])
@fault("the backend is gone for good", SERVERS, "own_backend")
def test_gone_for_good(own_backend, group, start, way):
    """Tried until the wait is over, then status 1, and no hang."""
    a = start("A", group, own_backend.url(), "--wait", "8")
    a.sees("4. members: A\n")
    own_backend.kill() if way == "refuses" else own_backend.pause()
    a.sees("; trying for another", "5. waited 8 s\n")
    a.sees(f"could not leave {group}: ", "forget us when our lease ends\n")
    a.ends(1)
    said_once(a)


@fault("all members wiped", ALL, "own_backend")
def test_wiped(own_backend, group, start):
    """Leases revoked, flush_all, files deleted: all join again."""
    a, b = pair(start, group, own_backend.url())
    own_backend.wipe()
    for client in a, b:
        client.sees("Joining again\n", f"2. (found|created) {group}\n", "3. joined")
    both_answer(start, group, own_backend.url(), a, b)


@fault("one node of three killed: the leader", ["cluster"], "own_backend")
def test_leader_killed(own_backend, group, start):
    """Nobody is gone, and a third one can join."""
    url = own_backend.url(timeout=10)
    a, b = pair(start, group, url)
    leader, others = own_backend.split()
    leader.kill()
    for node in others:
        node.wait_until_healthy()
    assert "gone" not in both_answer(start, group, url, a, b)


@fault("two nodes of three killed, then back", ["cluster"], "own_backend")
def test_majority_killed(own_backend, group, start):
    """Without a majority nothing is answered; with it, the group lives on."""
    url = own_backend.url(timeout=5)
    a, b = pair(start, group, url)
    leader, (other, _) = own_backend.split()
    for node in leader, other:
        node.kill()
    for client in a, b:
        client.sees("; trying for another")
    for node in leader, other:
        node.executors[0].start()
    for client in a, b:
        client.sees("answers again\n")
    both_answer(start, group, url, a, b)


# --- Crowds ---


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
@fault("50 clients join together, and leave together", ALL)
def test_crowd(backend, group, start):
    """All get in, the watcher sees all of them, and all get out."""
    url = backend.url(timeout=60)
    watcher = start("watcher", group, url, "--wait", "600")
    watcher.sees("4. members: watcher\n")
    names = [f"c{one:02}" for one in range(50)]
    crowd = subprocess.Popen(
        [sys.executable, "-c", CROWD, SCRIPT, " ".join(names), group, url],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        watcher.sees("members: " + ", ".join([*names, "watcher"]) + "\n")
        os.killpg(crowd.pid, signal.SIGTERM)
        watcher.sees("gone, members: watcher\n")
        _, errors = crowd.communicate(timeout=LIMIT)
        assert "Traceback" not in errors
        assert crowd.returncode == 0, errors
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(crowd.pid, signal.SIGKILL)
        crowd.wait()
    assert "watcher gone" not in watcher.transcript


# --- Ways to end that no table needs ---


@own("memcached")
def test_second_ctrl_c_kills(own_backend, group, start):
    """While leaving is stuck, a second Ctrl-C ends it at once, without a traceback."""
    a = start("A", group, own_backend.url())
    a.sees("4. members: A\n")
    own_backend.pause()
    a.hit(signal.SIGINT)
    a.sees("no answer; trying for another")
    a.hit(signal.SIGINT)
    a.ends(-signal.SIGINT)


@own("memcached")
def test_signal_while_suspended(own_backend, group, start):
    """Resumed with an overdue request, it still hears what came first: to leave."""
    a = start("A", group, own_backend.url(timeout=5), "--wait", "600")
    a.sees("4. members: A\n")
    own_backend.pause()
    a.sees("no answer; trying for another")
    a.hit(signal.SIGSTOP)
    a.hit(signal.SIGHUP)
    time.sleep(4)  # Two seconds had gone by: now the request is overdue.
    own_backend.resume()
    a.hit(signal.SIGCONT)
    a.sees(f"6. left {group} and stopped\n")
    a.ends(129)


@own("memcached")
def test_terminal_and_backend_gone(own_backend, tmp_path, group, start):
    """Where stderr goes to a file, the trouble is told there."""
    errors = tmp_path / "errors"
    under = ["bash", "-c", f'exec "$@" 2>{errors}', "-"]
    a = start("A", group, own_backend.url(), kind=TerminalClient, under=under)
    a.sees("4. members: A", "heartbeats sent: ")
    own_backend.pause()
    wait_until(lambda: "no answer" in errors.read_text())
    a.ptyproc.fileobj.close()
    a.wait()
    assert f"A: could not leave {group}: no answer" in errors.read_text()
    assert a.exitstatus == 1


@pytest.mark.skipif(not shutil.which("timeout"), reason="macOS has no timeout")
def test_timeout_command(servers, group, start):
    """`timeout` sends SIGTERM twice in a row; the client leaves all the same."""
    url = servers("memcached").url()
    a = start("A", group, url)
    a.sees("4. members: A\n")
    b = start("B", group, url, under=["timeout", "10"])
    b.sees("B: 6. left")
    b.ends(124)
    a.sees("B joined", "B gone")


def test_two_signals_in_a_row(servers, group, start):
    """The second one is not heard, whichever it is."""
    a = start("A", group, servers("file").url())
    a.sees("4. members: A\n")
    for first, second in (
        (signal.SIGTERM, signal.SIGTERM),
        (signal.SIGHUP, signal.SIGTERM),
        (signal.SIGINT, signal.SIGINT),
    ):
        b = start("B", group, servers("file").url())
        a.sees("B joined")
        b.hit(first)
        b.hit(second)
        b.sees("B: 6. left")
        a.sees("B gone")
        # The two may be swapped on the way.
        b.expect(pexpect.EOF)
        assert b.proc.wait(LIMIT) in {128 + first, 128 + second}


def test_nohup(servers, group, start):
    """nohup has SIGHUP ignored, and that stays so."""
    a = start("A", group, servers("file").url(), "--wait", "3", under=["nohup"])
    a.sees("4. members: A\n")
    a.hit(signal.SIGHUP)
    a.sees("5. waited 3 s\n", "6. left")
    a.ends(0)


def test_signal_before_joining(servers, group, start):
    """There is nothing to leave: the signal just ends it, without a traceback."""
    url = servers("etcd").url(timeout=30)
    start("A", group, url).sees("4. members: A\n")
    second = start("A", group, url)
    second.sees("the name A is taken")
    second.hit(signal.SIGINT)
    second.ends(-signal.SIGINT)


def test_reads_work_and_writes_fail(tmp_path, group, start):
    """Thrown out, and unable to join again: said once, not at every try."""
    server = BACKENDS["file"](tmp_path)
    a = start("A", group, server.url(), "--wait", "8")
    a.sees("4. members: A\n")
    shutil.rmtree(server.folder)
    a.sees("A gone, members: .none.\n", "Joining again\n", "; trying for another")
    a.sees("5. waited 8 s\n")
    a.ends(0)
    for words in "A gone", "Joining again", "trying for another":
        assert a.transcript.count(words) == 1


def test_names_of_others(tmp_path, group, start, monkeypatch):
    """Other programs may join under any name: it is shown, and does no harm."""
    monkeypatch.setenv("PYTHONIOENCODING", "latin-1")
    url = BACKENDS["file"](tmp_path).url()
    a = start("A", group, url)
    a.sees("4. members: A\n")
    for name, shown in (
        ("bob", "bob"),
        ("nœud".encode(), "n.ud"),
        (b"x\x1b[31m\ny", "x.{1,2}31m.y"),
        (b"\xff", "."),
    ):
        other = coordination.get_coordinator(url, name, executor="sync")
        other.start()
        other.join_group(group.encode()).get()
        a.sees(f"A: {CLOCK} {shown} joined, members: .*A.*\n")
        other.leave_group(group.encode()).get()
        a.sees(f"A: {CLOCK} {shown} gone, members: A\n")
        other.stop()
    a.hit(signal.SIGINT)
    a.ends(130)
    assert "\x1b" not in a.transcript


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="only Linux has /dev/full")
def test_full_disk(servers, group):
    """What cannot be written is said, once, and the client leaves."""
    with open("/dev/full", "w") as full:
        done = run(
            "A",
            group,
            servers("file").url(),
            capture_output=False,
            stdout=full,
            stderr=subprocess.PIPE,
        )
    assert done.stderr == "A: cannot write: No space left on device\n"
    assert done.returncode == 1
