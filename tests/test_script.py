"""When it is safe to act; texts and arguments; the lesson as the learner sees it."""

import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import time

import pyte
import pytest
from conftest import BACKENDS, CLOCK, GROUP, ROOT, SCRIPT, on, run
from tooz import coordination

import tooz_join_group as script


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until a test sets clock.time."""
    monkeypatch.setattr(script, "now", lambda: clock.time)
    clock.time = 1000
    return clock


@pytest.fixture
def member(tmp_path, clock):
    """A member with a lease of 6 s; its heart does not beat by itself."""
    member = coordination.get_coordinator(f"file://{tmp_path}?timeout=6", b"A")
    member.start()
    member.join_group_create(b"g")
    member.lease = script.Lease(member)
    polls = script.polls(member, b"g", b"A", {b"A"}, member.lease, math.inf)
    # Three turns: the poll that is sent in the second one has been answered.
    member.polls = lambda turns=3: [next(polls) for _ in range(turns)][-1]
    yield member
    member.stop()


def test_safe_for_two_thirds(member, clock):
    """It is safe to act for two thirds of a lease after a heartbeat, and not without one."""
    assert member.polls() == ({b"A"}, False)
    member.lease.heartbeat()
    assert member.polls() == ({b"A"}, True)
    clock.time = 1003.99
    assert member.polls() == ({b"A"}, True)
    clock.time = 1004.01
    assert member.polls() == ({b"A"}, False)


def test_safe_once_a_poll_is_answered(member, monkeypatch):
    """A heartbeat proves nothing until a poll that is sent after it lists us."""
    sleep = time.sleep
    beat = member.lease.heartbeat
    monkeypatch.setattr(time, "sleep", lambda seconds: [beat(), sleep(seconds)])
    assert member.polls(1) == ({b"A"}, False)  # It was sent before.
    assert member.polls(1) == ({b"A"}, True)


def test_slow_heartbeat(member, clock, monkeypatch):
    """It counts from before it was sent: the lease may have been renewed then."""
    monkeypatch.setattr(os, "utime", lambda *_: setattr(clock, "time", 1003))
    member.lease.heartbeat()
    assert member.lease.safe_until == 1004


def test_failed_heartbeat(member, clock, monkeypatch):
    """A failed one does not count."""
    member.lease.heartbeat()
    clock.time = 1001
    monkeypatch.setattr(os, "utime", lambda path, _: os.stat(f"{path}/none"))
    with pytest.raises(NotADirectoryError):
        member.lease.heartbeat()
    assert member.lease.safe_until == 1004


def test_failed_poll(member, tmp_path):
    """It proves no heartbeat, even if one seems to have been sent, as on memcached."""
    member.lease.safe_until = 1004
    next(tmp_path.glob("groups/*/*.raw")).write_bytes(b"")
    assert member.polls() == ({b"A"}, False)


def test_join_again(member, clock, tmp_path):
    """Whoever was dropped joins again once a heartbeat has been sent, and not before."""
    member.lease.heartbeat()
    assert member.polls() == ({b"A"}, True)
    next(tmp_path.glob("groups/*/*.raw")).unlink()
    assert member.polls(9) == (set(), False)
    clock.time = 1001
    member.lease.heartbeat()
    assert member.polls(6) == ({b"A"}, True)


def test_listing():
    """Names are sorted, whatever they are."""
    assert script.listing({b"B", "A", b"\xff"}) == "members: A, B, \udcff"
    assert script.listing(set()) == "members: (none)"


def parsed(monkeypatch, *arguments):
    """Return what the script's arguments() makes of these."""
    monkeypatch.setattr(sys, "argv", [SCRIPT.name, *arguments])
    return script.arguments()


ACCEPTED = """etcd3+http://localhost etcd3+https://h:2379?ca_cert=/x/y memcached://[::1]:11211
    memcached://me:p%2Fw@h memcached://h/ zookeeper://h1:2181,h2:2181 redis://h?db=1
    file:///tmp/x FILE:///x?timeout=5 etcd3+http://h?timeout=3&membership_timeout=15"""


def test_accepted(monkeypatch):
    """URLs of all drivers, the longest names, an option anywhere, and an endless wait."""
    for url in ACCEPTED.split():
        assert parsed(monkeypatch, "A", "g", url) == (url, b"A", b"g", 60)
    name = "Az09._-" + "c" * 93
    args = parsed(monkeypatch, name, "--wait", "inf", "g", "file:///x")
    assert args == ("file:///x", name.encode(), b"g", math.inf)


NAME = "use 1 to 100 of A-Z a-z 0-9 . _ -"
URL = "url: DRIVER://HOST[:PORT] or file:///PATH, no #, no timeout=0"
REFUSED = """localhost localhost:11211 etcd3+http:10.0.0.5 etcd3+http://:2379 etcd3+http://
    memcached:///127.0.0.1:11999 memcached://me:s3cr3t@ file://relative/path file:///
    file:///?timeout=5 file:///c#1 memcached://h#1 memcached://h/one etcd3+http://h/one
    redis://h/1 zookeeper://h/prod memcached://me:s3cr3t/x@h memcached://me:s3cr3t?x@h
    memcached://h?timeout=%30 file:///x?timeout=0 etcd3+http://h?timeout=-5
    etcd3+http://h?x=1&lock_timeout=0"""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [([bad, "g"], f"{bad!a}: {NAME}") for bad in ("", "a/b", "a\n", "é", "x" * 101)]
    + [(["c", "a b"], f"'a b': {NAME}")]
    + [(["c", "g", "--wait", bad], "use a number, 0 or more") for bad in ("-1", "nan")]
    + [
        (["c", "g", "--wait", bad], f"invalid float value: '{bad}'")
        for bad in ("x", "")
    ]
    + [(["c", "g", bad], URL) for bad in REFUSED.split()],
)
def test_refused(monkeypatch, capsys, arguments, message):
    """The last line says what is wanted, without a password, and the status is 2."""
    with pytest.raises(SystemExit, match="2"):
        parsed(monkeypatch, *arguments)
    shown = capsys.readouterr()
    assert shown.err.endswith(f"{message}\n")
    assert "s3cr3t" not in shown.err + shown.out


def test_missing_packages():
    """One line says what to do. (-S leaves site-packages out.)"""
    bare = [sys.executable, "-S", SCRIPT, "A", "g"]
    done = subprocess.run(bare, check=False, capture_output=True, text=True)
    said = r".*\. Try \.venv/bin/python, or: pip install -r requirements\.txt\n"
    assert re.fullmatch(said, done.stderr)
    assert done.returncode == 1


def test_dependencies():
    """For `uv run`, the script names the same packages."""
    required = (ROOT / "requirements.txt").read_text().split()
    assert f"# dependencies = {json.dumps(required)}\n# ///\n" in SCRIPT.read_text()


@on(*BACKENDS)
def test_six_steps(backend):
    """stdout has the lesson, in the lesson's order; stderr has nothing."""
    url = backend.url(timeout=5)
    done = run("A", GROUP, "--wait", "2", url)
    assert re.sub(f"(?m)^{CLOCK} ", "", done.stdout).splitlines() == [
        f"1. started a coordinator on {url}",
        f"2. created {GROUP}",
        f"3. joined {GROUP}",
        "4. members: A",
        "5. watching for 2 s",
        "start acting as a member, with a lease of 5 s",
        f"6. leaving {GROUP}",
        f"6. left {GROUP}",
    ]
    assert (done.stderr, done.returncode) == ("", 0)


@on(*BACKENDS)
def test_status_line(backend, start):
    """It falls, is restored, and meets no other line, even in a terminal of 20 columns."""
    a = start("A", backend.url(timeout=4), terminal=True, dimensions=(24, 20))
    a.sees("asking ", "1. started")  # Until the backend has answered.
    a.sees(*[rf"\d+ s remaining, safe to act for {one}\.\d s" for one in (2, 1, 2)])
    b = start("B", backend.url(timeout=4), until="4. members")
    a.sees("B joined, members: A, B")
    b.hit(signal.SIGTERM)
    a.sees("B gone, members: A", "s remaining")
    a.hit(signal.SIGINT)
    a.ends(-signal.SIGINT)
    shown = pyte.Screen(20, 300)
    pyte.Stream(shown).feed(a.transcript.replace("\n", "\r\n"))
    shown = "".join("".join(shown.display).split())
    assert not re.search("remaining|asking|safe", shown)
    assert shown.endswith(f"6.left{GROUP}")


def test_passwords_are_never_shown(start):
    """They are masked, in messages and in the status line."""
    url = "memcached://me:s3cr3t@127.0.0.1:1?ssl_key_password=s3cr3t"
    a = start("A", url, until=r"asking memcached://me:\*\*\*@127", terminal=True)
    a.ends(1)
    assert "s3cr3t" not in a.transcript


@pytest.mark.parametrize(
    ("backend", "url", "cause"),
    [
        ("files", "etcd3+http://localhost:1", "ConnectionRefusedError: .* refused"),
        ("files", "etcd3+http://127.0.0.1:SILENT?timeout=1", "imeout.*: timed out"),
        ("files", "memcached://127.0.0.1:SILENT?timeout=1", "imeout.*: timed out"),
        ("files", "etcd4://localhost", "NoMatches: No .* driver found.* 'etcd4'"),
        ("files", "file:///dev/null/x", "NotADirectoryError: .*/dev/null/x"),
        ("etcd", "etcd3+http://127.0.0.1:PORT?api_version=v9", ": 404 page not found"),
    ],
    indirect=["backend"],
)
def test_cannot_start(backend, url, cause):
    """The cause, and what to check or to type next. Exit status 1. (PORT is a server's.)"""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = url.replace("SILENT", str(silent.getsockname()[1]))
        url = url.replace("PORT", str(backend.port))
        done = run("A", GROUP, url)
    first, hint = done.stderr.splitlines()
    assert re.fullmatch(f"{CLOCK} backend error: .*({cause}).*", first)
    assert hint[9:].startswith(f"check {url} and NO_PROXY, start the backend, or use ")
    assert ("2. " in done.stdout, done.returncode) == (False, 1)


@pytest.mark.parametrize("line", ["members = coordinator", "for who in sorted"])
@on("memcached")
def test_mistake_of_a_learner(backend, start, tmp_path, line):
    """A name misspelt in step 4 or 5 is a traceback; what was joined is left all the same."""
    text, mistaken = SCRIPT.read_text(), tmp_path / SCRIPT.name
    assert line in text
    mistaken.write_text(text.replace(line, f"{line.rpartition(' ')[0]} typo"))
    a = start("A", backend.url(), script=mistaken)
    a.sees("6. left", "Traceback", "NameError: name 'typo.*' is not defined")
    a.ends(1, traceback=True)
    start("B", backend.url(), until="4. members: B\n")
