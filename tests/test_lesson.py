"""The lesson as the learner sees it: the six steps, the words, the ways in and out."""

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import threading

import pyte
import pytest
import trustme
from conftest import CLOCK, ROOT, SCRIPT, Etcd, command, on, run
from tooz import coordination

THREE = "etcd", "memcached", "file"


@on(*THREE)
def test_six_steps(backend, group):
    """stdout has the lesson, in the lesson's order; stderr has nothing."""
    url, lease = backend.url(), 10 if "file" in backend.base else 30
    done = run("A", group, url, "--wait", "0")
    assert done.stdout.splitlines() == [
        f"A: 1. started a coordinator on {url}",
        f"A: 2. created {group}",
        f"A: 3. joined {group} (lease: {lease} s)",
        "A: 4. members: A",
        "A: 5. waited 0 s",
        f"A: 6. left {group} and stopped",
    ]
    assert (done.stderr, done.returncode) == ("", 0)


@on(*THREE)
def test_two_clients_show_each_other(backend, group, start):
    """Each sees the other come and go, at once and with the new list."""
    a = start("A", backend.url())
    a.sees("A: 4. members: A\n")
    b = start("B", backend.url(), "--wait", "5")
    b.sees(f"B: 2. found {group}\n", "B: 3. joined", "B: 4. members: A, B\n")
    a.sees(rf"A: {CLOCK} B joined, members: A, B\n")
    b.sees("B: 5. waited 5 s\n", f"B: 6. left {group} and stopped\n")
    b.ends(0)
    a.sees(rf"A: {CLOCK} B gone, members: A\n")
    assert "\x1b" not in a.transcript


@on(*THREE)
def test_shortest_lease(backend, group):
    """A lease of one second is enough to join and to leave."""
    done = run("A", group, backend.url(timeout=1), "--wait", "2")
    assert "3. joined" in done.stdout
    assert done.returncode == 0


@pytest.mark.xdist_group("the default port of etcd")
def test_default_url(servers, group, tmp_path):
    """Without a URL: TOOZ_BACKEND_URL, or else the etcd on this machine."""
    url = servers("memcached").url()
    done = run("A", group, "--wait", "0", env={**os.environ, "TOOZ_BACKEND_URL": url})
    assert f"1. started a coordinator on {url}\n" in done.stdout
    with socket.socket() as probe:
        taken = probe.connect_ex(("127.0.0.1", 2379)) == 0
    server = None if taken else Etcd(tmp_path, port=2379).start()
    try:
        environment = {**os.environ, "TOOZ_BACKEND_URL": ""}
        done = run("A", group, "--wait", "0", env=environment)
    finally:
        if server:
            server.kill()
    assert "1. started a coordinator on etcd3+http://localhost\n" in done.stdout
    assert done.returncode == 0


@on("etcd")
def test_older_url(backend, group):
    """The lesson's etcd3:// is understood, and the script says so."""
    url = backend.url()
    old = url.replace("etcd3+http", "etcd3")
    done = run("A", group, old, "--wait", "0")
    assert done.stdout.startswith(f"A: {old} is now {url}\n")
    assert (done.stderr, done.returncode) == ("", 0)


# --- In a terminal ---


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
    for bar in ("#{9,10}\\.?", "#{5,7}\\.{3,5}") * 2:
        a.sees(rf"A: \d+ s to go, lease \[{bar}\] [1-4] s")
    b = start("B", backend.url(timeout=4))
    a.sees("B joined, members: A, B")
    b.process.terminate()
    a.sees("B gone, members: A", "s to go")
    a.send("\x03")
    a.sees("leaving")
    a.ends(130)
    assert re.fullmatch(
        rf"""A: 4\. members: A
A: {CLOCK} B joined, members: A, B
A: {CLOCK} B gone, members: A
(\^C)?A: 5\. interrupted
A: 6\. left {group} and stopped""",
        "\n".join(screen(a.transcript)[-5:]),
    )


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


# --- Words that go in, and words that come out ---


@pytest.mark.parametrize("bad", ["", "a/b", "a b", "é", "x" * 101, "a\n", "clientA?"])
def test_names(bad):
    """Names are what every backend can hold."""
    for arguments in ([bad, "g"], ["c", bad]):
        done = run(*arguments, "file:///nowhere")
        assert done.returncode == 2
        assert "use 1 to 100 of A-Z a-z 0-9 . _ -" in done.stderr


@on(*THREE)
def test_longest_names(backend):
    """Names of 100 characters do work."""
    done = run("c" * 100, "Az09._-" + "g" * 93, backend.url(), "--wait", "0")
    assert done.returncode == 0


@on("file")
def test_names_of_others(backend, group, start, monkeypatch):
    """Other programs may join under any name: it is shown, and does no harm."""
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    a = start("A", backend.url())
    a.sees("4. members: A\n")
    for name, shown in (
        ("bob", "bob"),
        ("café".encode(), "caf."),
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


@pytest.mark.parametrize("bad", ["-1", "nan", "inf", "-inf", "x", "", "1e999", "1e8"])
def test_wait(bad):
    """--wait takes a number of seconds that a timer can wait for."""
    done = run("c", "g", "file:///nowhere", "--wait", bad)
    assert done.returncode == 2
    assert "--wait" in done.stderr


@pytest.mark.parametrize("url", ["redis://:s3cr3t@localhost", "file:///50%25"])
def test_help(url):
    """--help names the backends, the lease and the exit statuses; no server is needed."""
    done = run("--help", env={**os.environ, "TOOZ_BACKEND_URL": url})
    for words in (
        "--wait SECONDS",
        "memcached://127.0.0.1:11211",
        "file:///tmp/tooz",
        "?timeout=5",
        "0 done, 1 could not do it, 2 wrong arguments, 128+n ended by signal n",
    ):
        assert words in done.stdout
    assert "s3cr3t" not in done.stdout
    assert done.returncode == 0


# --- Failing to start ---


@pytest.fixture(scope="module")
def strangers():
    """Return the ports of two strange services: one mute, one that talks like ssh."""
    here = ("127.0.0.1", 0)
    with socket.create_server(here) as mute, socket.create_server(here) as ssh:

        def talk():
            with contextlib.suppress(OSError):
                while True:
                    line, _ = ssh.accept()
                    with line:
                        line.sendall(b"SSH-2.0-OpenSSH\r\n")
                        line.recv(1000)

        threading.Thread(target=talk, daemon=True).start()
        yield {"MUTE": mute.getsockname()[1], "SSH": ssh.getsockname()[1]}
        ssh.shutdown(socket.SHUT_RDWR)


NAME = "(?i)name|resolution|known"
PORT = "the port is not a number from 1 to 65535"
PATH = "file:// takes an absolute path"
STRANGE = "SSH-2.0|reset|[Bb]roken"
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
        ("etcd3+http://127.0.0.1:SSH", STRANGE, ETCD),
        ("memcached://127.0.0.1:SSH", STRANGE, MEMCACHED),
        ("memcached://127.0.0.1:ETCD", "(?i)close|broken|reset", MEMCACHED),
        ("etcd3+http://127.0.0.1:MEMCACHED", "connection without response", ETCD),
        ("etcd3+http://nosuch.invalid", NAME, ETCD),
        ("memcached://nosuch.invalid", NAME, MEMCACHED),
        ("etcd4://localhost", "No .* driver found, looking for 'etcd4'", EXAMPLE),
        ("localhost", "No .* driver found", EXAMPLE),
        ("zookeeper://h1:2181,h2:2181", "'kazoo'", "'tooz[zookeeper]'"),
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
def test_cannot_start(url, why, what_to_do, strangers, servers, group):
    """One short message: the URL, the reason, what to do. Exit status 1."""
    for name, port in strangers.items():
        url = url.replace(f":{name}", f":{port}")
    for name in "etcd", "memcached":
        if f":{name.upper()}" in url:
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


@pytest.mark.parametrize(
    "url",
    [
        "memcached://me:s3cr3t@127.0.0.1:1",
        "redis://:s3cr3t@localhost",
        "etcd3+http://me:s3cr3t/s3cr3t@127.0.0.1:1",
        "etcd3://me:s3cr3t/s3cr3t@127.0.0.1:1",
        "memcached://127.0.0.1:1?ssl_key_password=s3cr3t",
    ],
)
def test_passwords_are_never_shown(url):
    """Not by us. (argparse shows what it does not understand: see the README.)"""
    done = run("A", "g", url, "--wait", "0")
    assert "s3cr3t" not in done.stdout + done.stderr
    assert "***" in done.stderr
    for wrong in ["/", "g"], ["A", "/"], ["A", "g", "--wait", "x"]:
        done = run(*wrong, env={**os.environ, "TOOZ_BACKEND_URL": url})
        assert "s3cr3t" not in done.stderr
        assert done.returncode == 2


@pytest.fixture(scope="module")
def tls(tmp_path_factory):
    """An etcd with a certificate, that of its authority, and that of another one."""
    folder = tmp_path_factory.mktemp("tls")
    authority = trustme.CA()
    certificate = authority.issue_cert("localhost", "127.0.0.1")
    certificate.private_key_pem.write_to_path(folder / "key.pem")
    certificate.cert_chain_pems[0].write_to_path(folder / "cert.pem")
    authority.cert_pem.write_to_path(folder / "right.pem")
    trustme.CA().cert_pem.write_to_path(folder / "wrong.pem")
    arguments = ["--cert-file", f"{folder}/cert.pem", "--key-file", f"{folder}/key.pem"]
    server = Etcd(folder, tls=arguments)
    try:
        yield server.start(), folder
    finally:
        server.kill()


def test_right_certificate(tls, group):
    """etcd3+https:// with the certificate of the right authority."""
    server, folder = tls
    done = run("A", group, server.url(ca_cert=folder / "right.pem"), "--wait", "0")
    assert "4. members: A\n" in done.stdout
    assert (done.stderr, done.returncode) == ("", 0)


@pytest.mark.parametrize("case", ["wrong authority", "no authority", "plain http"])
def test_wrong_certificate(tls, group, case):
    """Refused, with a message that says certificate."""
    server, folder = tls
    url = {
        "wrong authority": server.url(ca_cert=folder / "wrong.pem"),
        "no authority": server.url(),
        "plain http": server.url().replace("https", "http"),
    }[case]
    done = run("A", group, url, "--wait", "0")
    assert f"A: cannot use {url}: " in done.stderr
    assert "certificate" in done.stderr
    assert "?ca_cert=FILE" in done.stderr
    assert done.returncode == 1


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


def test_missing_packages():
    """Without Tooz: one line that says what to do. (-S leaves site-packages out.)"""
    bare = [sys.executable, "-S", SCRIPT, "A", "g"]
    done = subprocess.run(bare, check=False, capture_output=True, text=True)
    assert done.stderr.endswith("or: pip install -r requirements.txt\n")
    assert ".venv/bin/python" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert done.returncode == 1


def test_missing_driver(tmp_path):
    """A driver's package that is missing, of those in requirements.txt: name that file."""
    (tmp_path / "etcd3gw.py").write_text("import no_such_module")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = run("A", "g", "etcd3+http://localhost", env=environment)
    assert "pip install -r requirements.txt" in done.stderr
    assert done.returncode == 1


def test_ctrl_c_while_loading(programs):
    """Ctrl-C before anything has begun: no traceback either."""
    for delay in range(12):
        one = programs(*command("A", "g", "etcd3+http://127.0.0.1:1"))
        with contextlib.suppress(subprocess.TimeoutExpired):
            one.process.wait(delay / 50)
        one.hit(2)
        one.process.wait()
        # What Python loads first may still be hit. Loading Tooz takes ten times as long.
        assert "from tooz import" not in one.read()


# --- The files ---


def test_inline_metadata():
    """`uv run` reads the script's own list of packages: the same as requirements.txt."""
    block = re.search(r"(?m)^# /// script\n((?:#.*\n)+?)# ///$", SCRIPT.read_text())
    lines = [line[2:] for line in block.group(1).splitlines()]
    metadata = dict(line.split(" = ") for line in lines)
    required = (ROOT / "requirements.txt").read_text().split()
    assert json.loads(metadata["dependencies"]) == required
    assert metadata["requires-python"] == '">=3.9"'
    assert len(required) == 3


def test_shape():
    """One script, and beside it nothing but what a reader or a test needs."""
    files = subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True).split()
    assert {name.split("/")[0] for name in files} == {
        ".ci",
        ".gitignore",
        "README.md",
        "requirements.txt",
        "tests",
        "tooz_join_group.py",
    }
