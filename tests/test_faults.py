"""What can go wrong, and what the page promises of it, on real servers."""

import shutil
import signal
import time

import pytest
from conftest import BACKENDS, CLOCK, GROUP, command, on, run, suspend, wait_until
from tooz import coordination

LEASE = 5  # Seconds: short enough to wait for, long enough for a busy machine.
OUTAGE = "backend error: [A-Z][^\r\n]*: [^\r\n]*\n"
STARTS = "start acting as a member, with a lease of"
STOPS = "stop acting as a member: we may have been dropped\n"
LEFT = f"6. leaving {GROUP}\n", f"6. left {GROUP}\n"


def pair(start, url):
    """Return two clients, which see each other, and act."""
    a, b = (start(name, url) for name in "AB")
    for client in a, b:
        client.sees("members: A, B\n")
        if STARTS not in client.transcript:
            client.sees(STARTS)
    return a, b


def all_is_well(start, url, a, b):
    """Join with C, which all see, let A and B leave, and return what both have said."""
    c = start("C", url, until="members: A, B, C\n")
    for client in a, b:
        client.sees("members: A, B, C\n")
    said = a.transcript, b.transcript
    for client, gone in (a, "A gone, members: B, C"), (b, "B gone, members: C"):
        client.hit(signal.SIGINT)
        client.sees(*LEFT)
        client.ends(-signal.SIGINT)
        c.sees(gone)
    return said


@on(*BACKENDS)
def test_signal(backend, start):
    """After Ctrl-C, SIGTERM and SIGHUP it leaves, is gone at once, and dies of it."""
    a = start("A", backend.url(timeout=90), until="4. members")
    for number in signal.SIGINT, signal.SIGTERM, signal.SIGHUP:
        b = start("B", backend.url(timeout=90), until=STARTS)
        a.sees("B joined, members: A, B\n")
        b.hit(number)
        b.sees(*LEFT)
        b.ends(-number)
        a.sees(f"{CLOCK} B gone, members: A\n")


@on(*BACKENDS)
def test_crash(backend, start):
    """A crashed client stays a member until its lease expires, and no longer."""
    a, b = pair(start, backend.url(timeout=LEASE))
    b.hit(signal.SIGKILL)
    crashed = time.monotonic()
    a.sees(f"{CLOCK} B gone, members: A\n")
    # The last heartbeat was half a lease old; memcached counts seconds; 30 s would take 15.
    assert LEASE / 2 - 1.5 < time.monotonic() - crashed < 14


@on(*BACKENDS)
def test_suspended(backend, start):
    """Suspended for too long, it stops acting, joins again, and starts."""
    url = backend.url(timeout=2 * LEASE)
    a, b = pair(start, url)
    with backend.lock():
        suspend(b)
    a.sees("B gone, members: A\n")
    b.hit(signal.SIGCONT)
    a.sees("B joined, members: A, B\n")
    b.sees(STOPS, STARTS)
    said = all_is_well(start, url, a, b)
    assert [one.count(STOPS) for one in said] == [0, 1]


@on("etcd", "memcached")
def test_cut(backend, programs):
    """Cut off, B stops acting before A says that it is gone. One terminal shows the order."""
    gateway = backend.gateway()
    urls = zip("AB", (backend.url(2 * LEASE), gateway.url(2 * LEASE)))
    clients = [" ".join(command(name, GROUP, f"'{url}'")) for name, url in urls]
    with gateway.server:
        both = programs("bash", "-c", " & ".join([*clients, "wait"]))
        both.sees("members: A, B\n")
        while both.transcript.count(STARTS) < 2:
            both.sees(STARTS)
        gateway.pause()
        both.sees("B gone, members: A\n")
        assert STOPS in both.before.replace("\r", "")
        gateway.resume()
        both.sees("B joined, members: A, B\n", STARTS)
        assert both.transcript.count(STOPS) == 1


@on(*BACKENDS)
def test_name_of_the_living(backend, start):
    """A second client with its name is refused at once. The first one notices nothing."""
    url = backend.url(timeout=60)
    a, b = pair(start, url)
    done = run("B", GROUP, url)
    assert (done.stdout, done.returncode) == ("", 1)
    assert done.stderr[9:] == "B is a member already. Crashed? Wait for a lease\n"
    for said in all_is_well(start, url, a, b):
        assert " gone" not in said and STOPS not in said


@on(*BACKENDS)
def test_name_of_the_dead(backend, start):
    """It is refused until the lease has expired, although nobody else polls."""
    url = backend.url(timeout=2 * LEASE)
    start("A", url, until="4. members").hit(signal.SIGKILL)
    assert "Crashed?" in run("A", GROUP, url).stderr
    wait_until(lambda: run("A", GROUP, url, "--wait", "0").returncode == 0)


@pytest.mark.parametrize("content", [b"", bytes(60)], ids=["empty", "zeros"])
@on("files")
def test_damaged_entry(backend, start, content):
    """A power cut leaves an entry that nobody can read: its name is free later, too."""
    url = backend.url(timeout=LEASE)
    start("A", url, until="4. members").hit(signal.SIGKILL)
    next(backend.folder.glob("groups/*/*.raw")).write_bytes(content)
    wait_until(lambda: run("A", GROUP, url, "--wait", "0").returncode == 0)


@pytest.mark.parametrize(
    ("backend", "empty"),
    [("etcd", False), ("etcd", True), ("memcached", True)],
    indirect=["backend"],
)
def test_restart(backend, start, empty):
    """An outage is told once. With its data, nobody is gone after it; else all join again."""
    url = backend.url(timeout=20)
    a, b = pair(start, url)
    backend.kill()
    for client in a, b:
        client.sees(f"{CLOCK} {OUTAGE}")
    if empty and backend.folder:
        shutil.rmtree(backend.folder)
    backend.start()
    for client in a, b:
        client.sees(f"{CLOCK} backend is back\n")
    for said in all_is_well(start, url, a, b):
        assert [said.count(one) for one in ("error", "is back")] == [1, 1]
        assert (" gone" in said) is empty
        assert said.count("A joined") <= 3  # Not again and again.


@on("etcd", "memcached")
def test_hang(backend, start):
    """It stops acting, and its status line moves, though nothing answers; it starts again."""
    a = start("A", backend.url(timeout=LEASE), terminal=True)
    a.sees(STARTS, r"safe to act for [23]\.\d s")
    backend.pause()
    a.sees(r"safe to act for 1\.\d s", r"safe to act for 0\.\d s", STOPS, "remaining")
    backend.resume()
    a.sees(STARTS)


@pytest.mark.parametrize("way", ["kill", "pause"])
@on("etcd", "memcached")
def test_stays_down(backend, start, way):
    """The wait ends, leaving takes 10 s at most, and that it may have failed is told."""
    a = start("A", backend.url(timeout=60), "--wait", "4", until=STARTS)
    getattr(backend, way)()
    a.sees(LEFT[0])
    a.timeout = 20
    a.sees(OUTAGE, "if we are still listed, we are dropped when our lease")
    a.ends(1)


@on(*BACKENDS)
def test_deleted(backend, start):
    """Whoever finds itself and its group gone says so, and joins again, in a few lines."""
    url = backend.url(timeout=LEASE)
    a, b = pair(start, url)
    with backend.lock():
        suspend(a)  # Or one mends the group before the other has noticed.
        suspend(b)
    for name in b"A", b"B":
        other = coordination.get_coordinator(url, name)
        other.start()
        other.leave_group(GROUP.encode()).get()
    other.delete_group(GROUP.encode()).get()
    a.hit(signal.SIGCONT)
    a.sees("A gone, ", STOPS, "A joined, members: A", STARTS)
    b.hit(signal.SIGCONT)
    for said in all_is_well(start, url, a, b):
        assert "error" not in said
        assert len(said.splitlines()) <= 16


@pytest.mark.parametrize("second_press", [False, True])
@on("memcached")
def test_ctrl_c_twice(backend, start, second_press):
    """One press that arrives twice, as through `timeout`, leaves. A second press kills."""
    a = start("A", backend.url(), until=STARTS)
    backend.pause()
    a.hit(signal.SIGINT)
    begun = time.monotonic()
    if not second_press:
        time.sleep(0.02)  # Two signals, and not one that is still pending.
        a.hit(signal.SIGINT)
    a.sees(LEFT[0])
    # After one turn of the loop, and not when the poll that hangs gives up, after 30 s.
    assert time.monotonic() - begun < 5
    if second_press:
        time.sleep(1)
        a.hit(signal.SIGINT)
    else:
        backend.resume()
        a.sees(LEFT[1])
    a.ends(-signal.SIGINT)


@on("files")
def test_terminal_is_closed(backend, start):
    """The kernel sends SIGHUP, and no line can be written any more: it leaves."""
    a = start("A", backend.url(timeout=90), until="4. members")
    b = start("B", backend.url(timeout=90), until=STARTS, terminal=True)
    b.ptyproc.fileobj.close()
    a.sees("B joined, members: A, B\n", "B gone, members: A\n")


@pytest.mark.parametrize(("under", "status"), [("", 129), ("nohup ", 0)])
@on("files")
def test_reader_goes_away(backend, start, under, status):
    """That is a hang-up: it leaves. Under nohup it stays until its wait ends."""
    pipe = ["bash", "-c", f'{under}"$@" | sed 6q; exit $PIPESTATUS', "-"]
    url = backend.url(timeout=90)
    b = start("B", url, "--wait", "20", until=STARTS, under=pipe)
    start("C", url, until="B gone")  # It gives B something to say.
    b.ends(status)
