"""The lesson as the learner sees it: the six steps, the messages, the arguments."""

import json
import re
import signal
import socket
import subprocess
import sys

import pytest
from conftest import BACKENDS, CLOCK, GROUP, ROOT, SCRIPT, on, run, screen
from tooz import coordination


@on(*BACKENDS)
def test_six_steps(backend):
    """stdout has the lesson, in the lesson's order; stderr has nothing.

    With the longest names that one may have. Options may stand anywhere.
    """
    name, group = "Az09._-" + "c" * 93, "g" * 100
    url = backend.url(timeout=5)
    done = run(name, group, "--wait", "2", url)
    assert done.stdout.splitlines() == [
        f"{name}: 1. started a coordinator on {url}",
        f"{name}: 2. created {group}",
        f"{name}: 3. joined {group} (lease: 5 s)",
        f"{name}: 4. members: {name}",
        f"{name}: 5. waited 2 s",
        f"{name}: 6. leaving {group}",
        f"{name}: 6. left {group}",
    ]
    assert (done.stderr, done.returncode) == ("", 0)


@on(*BACKENDS)
def test_terminal(backend, start):
    """A status line shows the time remaining, and heartbeats. No other line meets it."""
    a = start("A", backend.url(timeout=4), terminal=True)
    a.sees("asking ", "1. started")  # Until the backend has answered.
    a.sees(r"\d+ s remaining, heartbeats: 1", r"\d+ s remaining, heartbeats: [2-9]")
    b = start("B", backend.url(timeout=4))
    a.sees("B joined, members: A, B")
    b.hit(signal.SIGTERM)
    a.sees("B gone, members: A", "s remaining")
    a.send("\x03")
    a.ends(130)
    shown = screen(a.transcript)
    assert not re.search("remaining|asking", "".join(shown))
    assert shown[-1] == f"A: 6. left {GROUP}"


@pytest.mark.parametrize("columns", [8, 44])
@on("files")
def test_narrow_terminal(backend, start, columns):
    """The status line never wraps, or it could not be erased."""
    name = "x" * 100
    run(name, GROUP, backend.url(), "--wait", "0")  # Now the group exists.
    size = {"terminal": True, "dimensions": (24, columns)}
    a = start(name, backend.url(), "--wait", "1", **size)
    a.ends(0)
    shown = "".join("".join(screen(a.transcript, columns)).split())
    piped = run(name, GROUP, backend.url(), "--wait", "1").stdout
    assert shown == "".join(piped.split())


NAME = "use 1 to 100 of A-Z a-z 0-9 . _ -"
WAIT = "use a number, 0 or more"
URL = "use DRIVER://HOST[:PORT] or file:///PATH, no port or timeout below 1, and no #"
URLS = """localhost etcd3+http:10.0.0.5 etcd3+http://:2379 memcached:///127.0.0.1:11999
    etcd3+http://localhost:abc memcached://h:0 memcached://h:-1 etcd3+http://[::1
    zookeeper://h1:2181,:2182 file://relative/path file:/path file:///?timeout=5 file:///c#1
    file:///x?timeout=0 etcd3+http://h?timeout=-5 memcached://h?membership_timeout=0&x=1"""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [([bad, "g"], NAME) for bad in ("", "a/b", "a b", "a\n", "é", "x" * 101, "A?")]
    + [(["c", "a/b"], NAME)]
    + [(["c", "g", "--wait", bad], WAIT) for bad in ("-1", "nan", "x", "")]
    + [(["c", "g", bad], URL) for bad in URLS.split()],
)
def test_wrong_arguments(arguments, message, monkeypatch):
    """One line quotes the value and says what is wanted, and the status is 2."""
    done = run(*arguments)
    bad = next(one for one in reversed(arguments) if one != "g")
    # A URL may have a password, so it is not quoted.
    quoted = "" if "://" in bad else f"{bad!a}: "
    assert f": {quoted}{message}" in done.stderr.splitlines()[-1]
    assert (done.stdout, done.returncode) == ("", 2)
    if len(arguments) == 3:  # The environment's URL is held to the same.
        monkeypatch.setenv("TOOZ_BACKEND_URL", arguments[2])
        assert run("c", "g").stderr == done.stderr


def test_help():
    """It fits a terminal."""
    shown = run("--help").stdout
    assert max(map(len, shown.splitlines())) < 80
    assert "How do my nodes know who is alive?" in shown


@on("files")
def test_name_of_another(backend, member, monkeypatch):
    """Other programs may join under any name: it is shown in ASCII, and does no harm."""
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    a = member("A", backend.url(), "--wait", "inf")
    name = b"\x1b[31m\ny\xff"
    other = coordination.get_coordinator(backend.url(), name, executor="sync")
    other.start()
    other.join_group(GROUP.encode()).get()
    shown = r"\\x1b\[31m\\ny\\udcff"
    a.sees(f"A: {CLOCK} {shown} joined, members: {shown}, A\n")
    other.stop()
    a.sees(f"A: {CLOCK} {shown} gone, members: A\n")


@pytest.mark.parametrize(
    ("backend", "url", "cause"),
    [
        ("files", "etcd3+http://localhost:1", "ConnectionRefusedError: .* refused"),
        ("files", "etcd3+http://127.0.0.1:SILENT?timeout=1", "imeout.*: timed out"),
        ("files", "memcached://127.0.0.1:SILENT?timeout=1", "imeout.*: timed out"),
        ("files", "etcd3+http://nosuch.invalid", "gaierror: "),
        ("files", "etcd4://localhost", "NoMatches: No .* driver found.* 'etcd4'"),
        ("files", "redis://h?socket_timeout=0.5", "ModuleNotFoundError: .*'redis'"),
        ("files", "file:///dev/null/x", "NotADirectoryError: .*/dev/null/x"),
        ("etcd", "memcached://127.0.0.1:PORT", "MemcacheUnexpected|Broken|Reset"),
        ("etcd", "etcd3+http://127.0.0.1:PORT?api_version=v9", ": 404 page not found"),
        ("files", "file:///tmp/x?timeout=1.5", "ValueError: .*'1.5'"),
        ("memcached", "etcd3+http://127.0.0.1:PORT", "RemoteDisconnected: "),
    ],
    indirect=["backend"],
)
def test_cannot_start(backend, url, cause):
    """One short message: the URL, the cause, what to type next. Exit status 1.

    PORT is that of a server; with files there is none.
    """
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = url.replace("SILENT", str(silent.getsockname()[1]))
        url = url.replace("PORT", str(backend.port))
        done = run("A", GROUP, url)
    first, hint = done.stderr.splitlines()
    assert re.fullmatch(f"A: cannot use {re.escape(url)}: .*({cause}).*", first)
    assert re.fullmatch(
        "A: check the URL .*file:///tmp/tooz.* runs there, and NO_PROXY", hint
    )
    assert "2. " not in done.stdout
    assert done.returncode == 1


@pytest.mark.parametrize(
    ("url", "status"),
    [
        ("memcached://me:s3cr3t@127.0.0.1:1", 1),
        ("redis://:s3cr3t@localhost", 1),
        ("memcached://127.0.0.1:1?ssl_key_password=s3cr3t", 1),
        ("etcd3+http://me:s3cr3t/s3cr3t@127.0.0.1:1", 2),
        ("etcd3+http://me:s3cr3t@127.0.0.1:x", 2),
    ],
)
def test_passwords_are_never_shown(url, status):
    """Neither those of a URL that works nor those of one that is refused."""
    done = run("A", "g", url)
    assert "s3cr3t" not in done.stdout + done.stderr
    assert done.returncode == status
    assert ("***" in done.stderr) == (status == 1)


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
