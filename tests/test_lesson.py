"""The lesson as the learner sees it: the six steps, the words, the ways in and out."""

import json
import os
import re
import socket
import subprocess
import sys

import pyte
import pytest
import trustme
from conftest import CLOCK, ROOT, SCRIPT, Etcd, on, run
from tooz import coordination

THREE = "etcd", "memcached", "file"


@on(*THREE)
def test_six_steps(backend, group):
    """stdout has the lesson, in the lesson's order; stderr has nothing.

    With the longest names that one may have, and with the shortest lease.
    """
    name, group = "Az09._-" + "c" * 93, group.ljust(100, "g")
    url = backend.url(timeout=1)
    done = run(name, group, url, "--wait", "2")
    assert done.stdout.splitlines() == [
        f"{name}: 1. started a coordinator on {url}",
        f"{name}: 2. created {group}",
        f"{name}: 3. joined {group} (lease: 1 s)",
        f"{name}: 4. members: {name}",
        f"{name}: 5. waited 2 s",
        f"{name}: 6. left {group} and stopped",
    ]
    assert (done.stderr, done.returncode) == ("", 0)


@pytest.mark.xdist_group("the default port of etcd")
def test_default_url(servers, group, tmp_path, request, monkeypatch):
    """Without a URL: TOOZ_BACKEND_URL, or else the etcd on this machine."""
    url = servers("etcd").url()
    # The lesson's older etcd3:// is understood, and the script says so.
    old = url.replace("etcd3+http", "etcd3")
    monkeypatch.setenv("TOOZ_BACKEND_URL", old)
    done = run("A", group, "--wait", "0")
    assert done.stdout.startswith(f"A: {old} is now {url}\nA: 1. started")
    assert (done.stderr, done.returncode) == ("", 0)
    server = Etcd(tmp_path, port=2379)
    if not server.executors[0].pre_start_check():  # Else somebody's own runs there.
        request.addfinalizer(server.start().kill)
    monkeypatch.setenv("TOOZ_BACKEND_URL", "")
    done = run("A", group, "--wait", "0")
    assert "1. started a coordinator on etcd3+http://localhost\n" in done.stdout
    assert f"3. joined {group} (lease: 30 s)\n" in done.stdout
    assert done.returncode == 0


def screen(text, columns=80):
    """Return what a terminal shows after that output, without empty lines."""
    terminal = pyte.Screen(columns, 300)
    pyte.Stream(terminal).feed(text)
    return [line.rstrip() for line in terminal.display if line.strip()]


@on(*THREE)
def test_terminal(backend, group, start):
    """A status line shows the time to go, and the lease. No other line meets it."""
    a = start("A", backend.url(timeout=4), terminal=True)
    # It runs down, and fills at the next heartbeat; so again and again.
    for bar in (r"#{10}\] 4", r"(#{8}\.{2}\] 3|#{5}\.{5}\] 2)") * 2:
        a.sees(rf"A: \d+ s to go, lease \[{bar} s")
    b = start("B", backend.url(timeout=4))
    a.sees("B joined, members: A, B")
    b.process.terminate()
    a.sees("B gone, members: A", "s to go")
    a.send("\x03")
    a.sees("leaving")
    a.ends(130)
    shown = screen(a.transcript)
    assert not re.search("to go|leaving|asking", "".join(shown))
    assert shown[-1] == f"A: 6. left {group} and stopped"


@pytest.mark.parametrize("columns", [8, 20, 44])
@pytest.mark.parametrize("name", ["A", "x" * 7, "x" * 100])
@on("file")
def test_narrow_terminal(backend, group, start, name, columns):
    """The status line never wraps, or it could not be erased. It gives up the bar first."""
    a = start(name, backend.url(), "--wait", "1", terminal=True, columns=columns)
    a.ends(0)
    steps = f"""{name}: 1. started a coordinator on {backend.url()}
        {name}: 2. created {group}
        {name}: 3. joined {group} (lease: 10 s)
        {name}: 4. members: {name}
        {name}: 5. waited 1 s
        {name}: 6. left {group} and stopped"""
    assert "".join("".join(screen(a.transcript, columns)).split()) == "".join(
        steps.split()
    )
    room = columns > len(f"{name}: 1 s to go, lease [##########] 10 s")
    assert ("lease [" in a.transcript) == room


@on("memcached", own=True)
def test_mute_backend(backend, start):
    """Until it answers for the first time, a status line names it."""
    backend.pause()
    a = start("A", backend.url(timeout=3), terminal=True)
    a.sees("1. started", f"A: asking {backend.url()}")
    a.sees("cannot use .*: no answer")
    a.ends(1)


def test_wrong_arguments():
    """Names are what every backend can hold, and a wait is what a timer can wait for."""
    for bad in "", "a/b", "a b", "é", "x" * 101, "a\n", "clientA?":
        for arguments in ([bad, "g"], ["c", bad]):
            done = run(*arguments, "file:///nowhere")
            assert "use 1 to 100 of A-Z a-z 0-9 . _ -" in done.stderr
            assert done.returncode == 2
    for bad in "-1", "nan", "inf", "x", "", "1e999", "1e8":
        done = run("c", "g", "file:///nowhere", "--wait", bad)
        assert "--wait" in done.stderr
        assert done.returncode == 2


@on("file")
def test_names_of_others(backend, group, start, member, monkeypatch):
    """Other programs may join under any name: it is shown, and does no harm."""
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    a = member("A", backend.url())
    for name, shown in (
        ("café", "caf."),
        (b"x\x1b[31m\ny", "x.{1,2}31m.y"),
        (b"\xff", "."),
    ):
        other = coordination.get_coordinator(backend.url(), name, executor="sync")
        other.start()
        other.join_group(group.encode()).get()
        a.sees(f"A: {CLOCK} {shown} joined, members: .*A.*\n")
        other.leave_group(group.encode()).get()
        a.sees(f"A: {CLOCK} {shown} gone, members: A\n")
        other.stop()
    assert "\x1b" not in a.transcript


NAME = "(?i)name|resolution|known"
PORT = "the port is not a number from 1 to 65535"
PATH = "file:// takes an absolute path"
SECONDS = "timeout= takes a whole number of seconds, 1 to 999999"
ETCD = "Start etcd: etcd --data-dir /tmp/etcd-data"
MEMCACHED = "Start memcached: memcached -u memcache"
EXAMPLE = "Examples: etcd3+http://localhost, memcached://127.0.0.1"


@pytest.mark.parametrize(
    ("url", "why", "what_to_do"),
    [
        ("etcd3+http://localhost:1", "Connection refused", ETCD),
        ("etcd3+https://127.0.0.1:1", "Connection refused", "?ca_cert=FILE"),
        ("memcached://localhost:1", "Connection refused", "memcached://127.0.0.1\n"),
        ("etcd3+http://127.0.0.1:MUTE?timeout=1", "no answer", ETCD),
        ("memcached://127.0.0.1:MUTE?timeout=1", "no answer", MEMCACHED),
        ("memcached://127.0.0.1:ETCD", "(?i)close|broken|reset", MEMCACHED),
        ("etcd3+http://127.0.0.1:MEMCACHED", "connection without response", ETCD),
        ("etcd3+http://nosuch.invalid", NAME, ETCD),
        ("memcached://nosuch.invalid", NAME, MEMCACHED),
        ("etcd4://localhost", "No .* driver found, looking for 'etcd4'", EXAMPLE),
        ("localhost", "No .* driver found", EXAMPLE),
        ("zookeeper://h1:2181,h2:2181", "'kazoo'", "'tooz[zookeeper]'"),
        ("redis://localhost?socket_timeout=0.5", "'redis'", "'tooz[redis]'"),
        ("etcd3+http://localhost:abc", PORT, EXAMPLE),
        ("etcd3+http://localhost:0", PORT, EXAMPLE),
        ("memcached://localhost:99999", "(?i)port", EXAMPLE),
        ("etcd3+http://[::1", "that is not a URL", EXAMPLE),
        ("etcd3+http://localhost?timeout=abc", SECONDS, EXAMPLE),
        ("etcd3+http://localhost?timeout=0", SECONDS, EXAMPLE),
        ("file:///tmp/x?timeout=1.5", SECONDS, EXAMPLE),
        ("memcached://localhost?membership_timeout=0", "membership_" + SECONDS, ""),
        ("memcached://127.0.0.1:MEMCACHED?executor=x", "Unknown executor 'x'", ""),
        ("file://relative/path", PATH, EXAMPLE),
        ("file:relative/path", PATH, EXAMPLE),
        ("file:///dev/null/x", "Not a directory", "Without"),
    ],
)
def test_cannot_start(url, why, what_to_do, servers, group):
    """One short message: the URL, the reason, what to do. Exit status 1."""
    with socket.create_server(("127.0.0.1", 0)) as mute:
        url = url.replace("MUTE", str(mute.getsockname()[1]))
        for name in "etcd", "memcached":
            if name.upper() in url:
                url = url.replace(name.upper(), str(servers(name).port))
        done = run("A", group, url)
    assert f"A: cannot use {url}: " in done.stderr
    assert re.search(why, done.stderr), done.stderr
    assert what_to_do in done.stderr
    assert done.stderr.endswith("Without a server: file:///tmp/tooz\n")
    assert len(done.stderr.splitlines()) <= 6
    assert "2. " not in done.stdout
    assert done.returncode == 1


@pytest.mark.parametrize("variable", ["HTTP_PROXY", "http_proxy", "all_proxy"])
@on("etcd")
def test_proxy(backend, group, variable):
    """A proxy that fails is named; with NO_PROXY it is not asked."""
    environment = {**os.environ, variable: "http://me:s3cr3t@127.0.0.1:1"}
    done = run("A", group, backend.url(), "--wait", "0", env=environment)
    assert "the proxy http://me:***@127.0.0.1:1. To go without: NO_PROXY" in done.stderr
    assert done.returncode == 1
    environment["NO_PROXY"] = "127.0.0.1"
    assert (
        run("A", group, backend.url(), "--wait", "0", env=environment).returncode == 0
    )
    done = run("A", group, "etcd3+http://127.0.0.1:1", env=environment)
    assert ETCD in done.stderr


def test_passwords_are_never_shown(monkeypatch):
    """Not by us. (argparse shows what it does not understand: see the README.)"""
    for url in (
        "memcached://me:s3cr3t@127.0.0.1:1",
        "redis://:s3cr3t@localhost",
        "etcd3://me:s3cr3t/s3cr3t@127.0.0.1:1",
        "memcached://127.0.0.1:1?ssl_key_password=s3cr3t",
    ):
        monkeypatch.setenv("TOOZ_BACKEND_URL", url)
        for arguments in ["A", "g"], ["A", "/"], ["A", "g", "--wait", "x"]:
            done = run(*arguments)
            assert "s3cr3t" not in done.stdout + done.stderr
            assert ("***" in done.stderr) == (arguments == ["A", "g"])


def test_certificates(tmp_path, group):
    """A server's certificate is checked; what is refused is told, and the remedy."""
    authority = trustme.CA()
    certificate = authority.issue_cert("localhost", "127.0.0.1")
    certificate.private_key_pem.write_to_path(tmp_path / "key.pem")
    certificate.cert_chain_pems[0].write_to_path(tmp_path / "cert.pem")
    authority.cert_pem.write_to_path(tmp_path / "right.pem")
    trustme.CA().cert_pem.write_to_path(tmp_path / "wrong.pem")
    files = ["--cert-file", tmp_path / "cert.pem", "--key-file", tmp_path / "key.pem"]
    server = Etcd(tmp_path, tls=[*map(str, files)]).start()
    try:
        for url, status in (
            (server.url(ca_cert=tmp_path / "right.pem"), 0),
            (server.url(ca_cert=tmp_path / "wrong.pem"), 1),
            (server.url(), 1),
            (server.url().replace("https", "http"), 1),
        ):
            done = run("A", group, url, "--wait", "0")
            assert done.returncode == status
            for words in f"A: cannot use {url}: ", "certificate", "?ca_cert=FILE":
                assert (words in done.stderr) == bool(status)
    finally:
        server.kill()


@on("etcd", own=True)
def test_password_asked_for(backend, group):
    """An etcd with authentication on: say what it said, and that Tooz cannot log in."""
    backend.ctl("user", "add", "root:pw")
    backend.ctl("user", "grant-role", "root", "root")
    backend.ctl("auth", "enable")
    done = run("A", group, backend.url(), "--wait", "0")
    assert (
        f"cannot use {backend.url()}: etcdserver: user name is empty\n" in done.stderr
    )
    assert "password" in done.stderr
    assert done.returncode == 1


def test_missing_packages(tmp_path, monkeypatch):
    """One line says what to do. (-S leaves site-packages out.)"""
    bare = [sys.executable, "-S", SCRIPT, "A", "g"]
    done = subprocess.run(bare, check=False, capture_output=True, text=True)
    said = r".*\. Try \.venv/bin/python, or: pip install -r requirements\.txt\n"
    assert re.fullmatch(said, done.stderr)
    assert done.returncode == 1
    (tmp_path / "etcd3gw.py").write_text("import no_such_module")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    done = run("A", "g", "etcd3+http://localhost")
    assert "  pip install -r requirements.txt, or" in done.stderr
    assert done.returncode == 1


def test_inline_metadata():
    """`uv run` reads the script's own list of packages: the same as requirements.txt."""
    required = (ROOT / "requirements.txt").read_text().split()
    assert f"# dependencies = {json.dumps(required)}\n# ///\n" in SCRIPT.read_text()
    assert '# requires-python = ">=3.9"\n' in SCRIPT.read_text()
    assert len(required) == 3


def test_shape():
    """One script, and beside it nothing but what a reader or a test needs."""
    files = subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True).split()
    here = ".ci .gitignore README.md requirements.txt tests tooz_join_group.py"
    assert {name.split("/")[0] for name in files} == {*here.split()}
