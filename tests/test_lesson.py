"""The lesson as the learner sees it: the six steps, the words, the ways in and out."""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading

import pyte
import pytest
import trustme
from conftest import (
    CLOCK,
    LIMIT,
    ROOT,
    SCRIPT,
    Etcd,
    TerminalClient,
    command,
    own,
    run,
    three,
)

STEPS = r"""
A: 1\. started a coordinator on \S+
A:    it keeps a silent member for (30|10) s \(the lease\); Tooz calls it (causal|linearizable|non timeout based)[a-z ,]*
A: 2\. created GROUP
A: 3\. joined GROUP
A: 4\. members: A
A: 5\. waited 0 s
A: 6\. left GROUP and stopped
"""


@three()
def test_six_steps(backend, group):
    """stdout has the lesson, in the lesson's order; stderr has nothing."""
    done = run("A", group, backend.url(), "--wait", "0")
    assert re.fullmatch(
        STEPS.strip().replace("GROUP", re.escape(group)), done.stdout.strip()
    )
    assert (done.stderr, done.returncode) == ("", 0)


@three()
def test_two_clients_show_each_other(backend, group, start):
    """Each sees the other come and go, at once and with the new list."""
    a = start("A", group, backend.url())
    a.sees(r"A: 4\. members: A\r?\n")
    b = start("B", group, backend.url(), "--wait", "5")
    b.sees(
        rf"B: 2\. found {group}\r?\n", r"B: 3\. joined", r"B: 4\. members: A, B\r?\n"
    )
    a.sees(rf"A: {CLOCK} B joined, members: A, B\r?\n")
    b.sees(r"B: 5\. waited 5 s\r?\n", r"B: 6\. left \S+ and stopped\r?\n")
    b.ends(0)
    a.sees(rf"A: {CLOCK} B gone, members: A\r?\n")
    a.hit(signal.SIGINT)
    a.sees(r"A: 6\. left")
    a.ends(130)
    assert "\x1b" not in a.transcript


def test_default_url(servers, group, tmp_path, default_etcd_port):
    """Without a URL: TOOZ_BACKEND_URL, or else the etcd on this machine."""
    url = servers("memcached").url()
    done = run("A", group, "--wait", "0", env={**os.environ, "TOOZ_BACKEND_URL": url})
    assert f"1. started a coordinator on {url}\n" in done.stdout
    with socket.socket() as probe:
        taken = probe.connect_ex(("127.0.0.1", 2379)) == 0
    server = None if taken else Etcd(tmp_path, port=2379).start()
    try:
        done = run(
            "A", group, "--wait", "0", env={**os.environ, "TOOZ_BACKEND_URL": ""}
        )
    finally:
        if server:
            server.kill()
    assert "1. started a coordinator on etcd3+http://localhost\n" in done.stdout
    assert done.returncode == 0


def test_older_url(servers, group):
    """The lesson's etcd3:// is understood, and the script says so."""
    url = servers("etcd").url()
    old = url.replace("etcd3+http", "etcd3")
    done = run("A", group, old, "--wait", "0")
    assert done.stdout.startswith(f"A: {old} is now {url}\n")
    assert (done.stderr, done.returncode) == ("", 0)


@three()
def test_terminal(backend, group, start):
    """A terminal has a status line: seconds left, heartbeats. No event line meets it."""
    a = start("A", group, backend.url(timeout=4), kind=TerminalClient)
    a.sees(r"A: \d+ s left, heartbeats sent: [01]")
    b = start("B", group, backend.url(timeout=4))
    a.sees("B joined, members: A, B")
    b.hit(signal.SIGINT)
    a.sees("B gone, members: A")
    a.sees(r"left, heartbeats sent: [2-9]")
    a.sendintr()
    a.ends(130)
    screen = pyte.Screen(80, 24)
    pyte.Stream(screen).feed(a.transcript)
    lines = [line.rstrip() for line in screen.display if line.strip()]
    assert re.fullmatch(
        rf"A: 4\. members: A\nA: {CLOCK} B joined, members: A, B\n"
        rf"A: {CLOCK} B gone, members: A\n(\^C)?A: 6\. left {group} and stopped",
        "\n".join(lines[-4:]),
    ), lines


def test_narrow_terminal(servers, group, start):
    """The status line never wraps, or it could not be redrawn."""
    name = "x" * 70
    a = start(name, group, servers("file").url(), kind=TerminalClient)
    a.sees(r"\x1b\[Kx{70}: \d+ s l?e?f?\r", r"\x1b\[Kx{70}: \d+ s l?e?f?\r")


def test_no_room_for_a_status_line(servers, group, start):
    """A name that fills the terminal: only the lesson is printed."""
    url = servers("file").url()
    a = start("x" * 79, group, url, "--wait", "1", kind=TerminalClient)
    a.ends(0)
    steps = re.findall(r"\x1b\[Kx{79}: (.)", a.transcript)
    assert "".join(steps) == "1 23456"


@pytest.mark.parametrize("bad", ["", "a/b", "a b", "é", "x" * 101, "a\n", "clientA?"])
def test_names(bad):
    """Names are what every backend can hold."""
    for arguments in ([bad, "g"], ["c", bad]):
        done = run(*arguments, "file:///nowhere")
        assert done.returncode == 2
        assert "use 1 to 100 of A-Z a-z 0-9 . _ -" in done.stderr


def test_longest_names(servers):
    """Names of 100 characters do work."""
    for server in "etcd", "memcached", "file":
        url = servers(server).url()
        done = run("c" * 100, "Az09._-" + "g" * 93, url, "--wait", "0")
        assert done.returncode == 0


@pytest.mark.parametrize("bad", ["-1", "nan", "inf", "-inf", "x", "", "1e999"])
def test_wait(bad):
    """--wait takes a number of seconds that one can wait for."""
    done = run("c", "g", "file:///nowhere", "--wait", bad)
    assert done.returncode == 2
    assert "--wait" in done.stderr


def test_help():
    """--help names the backends, the lease and the exit statuses; no server is needed."""
    done = run("--help")
    for words in (
        "--wait SECONDS",
        "--debug",
        "memcached://localhost:11211",
        "file:///tmp/tooz",
        "?timeout=5",
        "0 done, 1 could not do it, 2 wrong arguments, 128+n ended by signal n",
    ):
        assert words in done.stdout
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


ETCD = "Start etcd: etcd --data-dir /tmp/etcd-data"
MEMCACHED = "Start memcached: memcached -u memcache"
EXAMPLE = "Examples: etcd3+http://localhost, memcached://localhost"


@pytest.mark.parametrize(
    ("url", "why", "what_to_do"),
    [
        ("etcd3+http://localhost:1", "Connection refused", ETCD),
        ("memcached://localhost:1", "Connection refused", MEMCACHED),
        ("etcd3+http://127.0.0.1:MUTE?timeout=1", "no answer within 1 s", ETCD),
        ("memcached://127.0.0.1:MUTE?timeout=1", "no answer within 1 s", MEMCACHED),
        (
            "etcd3+http://127.0.0.1:MUTE?timeout=3",
            "no answer; trying for another 1 s",
            ETCD,
        ),
        ("etcd3+http://127.0.0.1:SSH", "SSH-2.0|reset|[Bb]roken", ETCD),
        ("memcached://127.0.0.1:SSH", "SSH-2.0|reset|[Bb]roken", MEMCACHED),
        ("memcached://127.0.0.1:ETCD", "(?i)close|broken|reset", MEMCACHED),
        (
            "etcd3+http://127.0.0.1:MEMCACHED",
            "closed connection without response",
            ETCD,
        ),
        ("etcd3+http://nosuch.invalid", "(?i)name|resolution|known", ETCD),
        ("memcached://nosuch.invalid", "(?i)name|resolution|known", MEMCACHED),
        ("etcd4://localhost", "No .* driver found, looking for 'etcd4'", EXAMPLE),
        ("localhost", "No .* driver found", EXAMPLE),
        (
            "zookeeper://localhost",
            "No module named 'kazoo'",
            "pip install 'tooz[zookeeper]'",
        ),
        ("etcd3+http://localhost:abc", "the port is not a number", EXAMPLE),
        ("etcd3+http://localhost:0", "the port is not a number", EXAMPLE),
        ("memcached://localhost:99999", "(?i)port", EXAMPLE),
        (
            "etcd3+http://localhost?timeout=abc",
            "timeout= takes a whole number",
            EXAMPLE,
        ),
        ("etcd3+http://localhost?timeout=0", "timeout= takes a whole number", EXAMPLE),
        ("file:///tmp/x?timeout=1.5", "timeout= takes a whole number", EXAMPLE),
        ("etcd3+http://localhost?membership_timeout=x", "invalid literal", EXAMPLE),
        (
            "memcached://127.0.0.1:MEMCACHED?membership_timeout=0",
            "must be 1 s",
            EXAMPLE,
        ),
        (
            "memcached://127.0.0.1:MEMCACHED?executor=x",
            "Unknown executor 'x'",
            MEMCACHED,
        ),
        ("file://relative/path", "file:// takes an absolute path", EXAMPLE),
        ("file:relative/path", "file:// takes an absolute path", EXAMPLE),
        ("file:///dev/null/x", "Not a directory", "Without"),
        ("etcd3+https://127.0.0.1:1", "Connection refused", "?ca_cert=FILE"),
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
    assert "1. started" not in done.stdout or "executor" in url
    assert done.returncode == 1


# Run a command in a network of its own, whose name server never answers.
NAMESPACE = ["unshare", "--map-root-user", "--mount", "--net"]
SILENT_NAME_SERVER = r"""
ip link set lo up
echo nameserver 127.0.0.1 >"$1/resolv.conf" && mount --bind "$1/resolv.conf" /etc/resolv.conf
echo hosts: files dns >"$1/nsswitch.conf" && mount --bind "$1/nsswitch.conf" /etc/nsswitch.conf
exec "$2" -c '
import os, socket, sys
server = socket.socket(type=socket.SOCK_DGRAM)
server.bind(("127.0.0.1", 53))
server.set_inheritable(True)
os.execv(sys.argv[1], sys.argv[1:])' "${@:2}"
"""


def can_have_a_network_of_its_own():
    """Linux, and either root or a kernel that lets users have namespaces."""
    if not (shutil.which("unshare") and shutil.which("ip")):
        return False
    return subprocess.run([*NAMESPACE, "true"], check=False).returncode == 0


@pytest.mark.parametrize("scheme", ["etcd3+http", "memcached"])
def test_silent_name_server(scheme, tmp_path, group, start):
    """Python asks it for longer than that, and hears no signal meanwhile."""
    if not can_have_a_network_of_its_own():
        pytest.skip("no namespaces here")
    under = [*NAMESPACE, "bash", "-c", SILENT_NAME_SERVER, "-", str(tmp_path)]
    a = start("A", group, f"{scheme}://nosuch.example?timeout=3", under=under)
    a.sees(r"no answer; trying for another \d s\n", r"no answer within 3 s\n")
    a.ends(1)


def test_passwords_are_never_shown(servers):
    """Not in a message, not in a traceback, not by argparse."""
    for url in (
        f"memcached://me:s3cr3t@127.0.0.1:{servers('memcached').port}",
        "redis://:s3cr3t@localhost",
        "etcd3+http://me:s3cr3t/s3cr3t@127.0.0.1:1",
        "etcd3://me:s3cr3t/s3cr3t@127.0.0.1:1",
        "memcached://127.0.0.1:1?ssl_key_password=s3cr3t",
    ):
        for debug in [], ["--debug"]:
            done = run("A", "g", url, "--wait", "0", *debug)
            assert "s3cr3t" not in done.stdout + done.stderr
            assert "***" in done.stdout + done.stderr
        for wrong in [url, "g"], ["A", url], ["A", "g", "file:///x", url]:
            done = run(*wrong)
            assert "s3cr3t" not in done.stdout + done.stderr
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


@own("etcd")
def test_password_asked_for(own_backend, group):
    """An etcd with authentication on: say what it said, and that Tooz cannot log in."""
    own_backend.ctl("user", "add", "root:pw")
    own_backend.ctl("user", "grant-role", "root", "root")
    own_backend.ctl("auth", "enable")
    done = run("A", group, own_backend.url(), "--wait", "0")
    assert "etcdserver: user name is empty" in done.stderr
    assert "password" in done.stderr
    assert done.returncode == 1


def test_debug(group):
    """--debug shows tracebacks; run() sees to it that nothing else does."""
    done = run("A", group, "memcached://127.0.0.1:1", "--debug")
    assert "Traceback (most recent call last)" in done.stderr
    assert "ConnectionRefusedError" in done.stderr
    assert done.returncode == 1


def test_missing_packages():
    """Without Tooz: one line that says what to install. (-S leaves site-packages out.)"""
    bare = [sys.executable, "-S", SCRIPT, "A", "g"]
    done = subprocess.run(bare, check=False, capture_output=True, text=True)
    assert done.stderr.endswith("pip install -r requirements.txt\n")
    assert len(done.stderr.splitlines()) == 1
    assert done.returncode == 1


def test_ctrl_c_while_loading():
    """Ctrl-C before anything has begun: no traceback either."""
    for delay in range(12):
        process = subprocess.Popen(command("A", "g"), stderr=subprocess.PIPE, text=True)
        try:
            process.wait(delay / 50)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=LIMIT)
        # What Python loads first may still be hit. Loading Tooz takes ten times as long.
        assert "from tooz import" not in errors


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
