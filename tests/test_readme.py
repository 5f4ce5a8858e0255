"""The README cannot rot: its commands are typed, in real terminals, and do what it says."""

import collections
import os
import pathlib
import re
import shutil
import sys
import textwrap

import pexpect
import picture
import port_for
import pytest
from conftest import CLOCK, README, SCRIPT, Program, free_port, on, wait_until
from test_faults import STARTS, STOPS

SECTIONS = dict(text.split("\n", 1) for text in README.split("\n## ")[1:])
# Nobody reads a server's log, and a terminal that is full would stop it.
QUIET = "exec >/dev/null 2>&1\n"


def blocks(heading, kind="sh|python"):
    """Return the blocks under a heading of the page that are typed or saved."""
    found = re.findall(rf"(?ms)^ *```(?:{kind})\n(.*?)^ *```$", SECTIONS[heading])
    return [textwrap.dedent(text) for text in found]


def said(text):
    """Return the script's lines in a text, without the time, which changes."""
    return re.findall(f"(?<!# ){CLOCK} (.*)", text)


class Shell(Program):
    """A terminal: its own ports are in the place of the page's, its folder in that of /tmp."""

    def __init__(self, folder, ports, cwd):
        url, peer = (f"http://localhost:{ports[port]}" for port in ("2379", "2380"))
        env = {
            **os.environ,
            "ETCD_LISTEN_CLIENT_URLS": url,
            "ETCD_ADVERTISE_CLIENT_URLS": url,
            "ETCD_LISTEN_PEER_URLS": peer,
            "ETCD_INITIAL_ADVERTISE_PEER_URLS": peer,
            "ETCD_INITIAL_CLUSTER": f"default={peer}",
            "ETCDCTL_ENDPOINTS": url,
            "TOOZ_BACKEND_URL": f"etcd3+{url}",
            "PATH": f"{sys.prefix}/bin:{os.environ['PATH']}",
        }
        words, size = ["bash", "--noprofile", "--norc"], (24, 200)
        super().__init__(*words, terminal=True, env=env, cwd=cwd, dimensions=size)
        self.folder, self.ports = folder, ports

    def types(self, *texts):
        """Type these commands, with our ports and our folder."""
        for text in texts:
            text = re.sub(r"etcd3\+http://[\w.]+(?=[ ?])", r"\g<0>:2379", text)
            text = re.sub(r"(?m)^memcached .*", r"\g<0> -p 11211", text)
            ours = lambda port: str(self.ports[port[0]])
            text = re.sub(r"\b(2379|23790|11211)\b", ours, text)
            text = text.replace("192.0.2.1", "127.0.0.1")
            self.send(text.replace("/tmp/", f"{self.folder}/"))

    def joins(self, text, *members):
        """Type the command of a client, and again until its server is there."""
        ends = [f"4. members: {', '.join(members)}\r\n", "NO_PROXY"]
        wait_until(lambda: self.types(text) or self.expect(ends) == 0)

    def leaves(self):
        """Press Ctrl-C."""
        self.sees("remaining")
        self.send("\x03")
        self.sees("6. left")


@pytest.fixture
def shell(programs, tmp_path):
    """Open terminals with shell(command, …), in a folder with the script."""
    ports = collections.defaultdict(free_port)
    if "gw0" in os.environ.get("PYTEST_XDIST_WORKER", "gw0"):  # It may have the page's.
        typed = (port for port in (2379, 11211) if not port_for.port_is_used(port))
        ports.update({str(port): port for port in typed})
    (tmp_path / SCRIPT.name).symlink_to(SCRIPT)

    def shell(*texts, cwd=tmp_path):
        one = programs(tmp_path, ports, cwd, kind=Shell)
        one.types(*texts)
        return one

    return shell


def test_try_it(tmp_path, shell):
    """The first commands, in a folder with nothing else: a leave, a crash, the transcript."""
    first, second, background, kill = blocks("Try it")
    clone = tmp_path / "clone"
    clone.mkdir()
    for name in "requirements.txt", SCRIPT.name:
        shutil.copy(SCRIPT.parent / name, clone)
    a = shell(first, cwd=clone)
    a.timeout = 240  # pip takes its time.
    a.sees(STARTS)
    b = shell(second, cwd=clone)
    b.sees("4. members: clientA, clientB\n")
    b.leaves()
    a.sees("clientB joined", "clientB gone")
    b.types(background)
    a.sees("clientB joined")
    b.types(kill)
    a.sees("clientB gone")
    transcript = a.transcript.replace(str(tmp_path), "/tmp")
    assert said(transcript) == said(*blocks("Try it", "text"))


def test_etcd(shell):
    """Look at the keys, the lease, and the events."""
    etcd, clients, keys, leases, watch = blocks("With etcd")
    a_joins, b_joins = clients.splitlines(keepends=True)
    shell(QUIET, etcd)
    a, b, events = shell(), shell(), shell()
    a.joins(a_joins, "clientA")
    b.joins(b_joins, "clientA", "clientB")
    shell(keys).sees("groups/group1/\n", "group1/clientA\n", "group1/clientB\n")
    shell(leases).sees(r"TTL\(30s\), remaining\(\d+s\), attached keys\(\[too.*tA")
    events.types(watch)
    while events.expect(["PUT", pexpect.TIMEOUT], timeout=2) == 1:  # Not yet watching.
        shell(a_joins.replace("clientA", "clientC")).leaves()
    b.leaves()
    events.sees("DELETE\ntooz/groups/group1/clientB")
    b.types(b_joins.replace("\n", " &\n"))
    events.sees("PUT\ntooz/groups/group1/clientB")
    b.types("kill -9 %1\n")
    events.sees("DELETE\ntooz/groups/group1/clientB")


def test_memcached(shell):
    """B is killed; A removes it when its lease has expired."""
    memcached, clients = blocks("With memcached")
    a_joins, b_joins = clients.splitlines(keepends=True)
    shell(QUIET, memcached)
    a, b = shell(), shell()
    a.joins(a_joins, "clientA")
    b.types(b_joins)
    a.sees("clientB joined")
    b.types("kill -9 %1\n")
    a.sees("clientB gone")


def test_lesson(shell, tmp_path):
    """The bare lesson fails as the page says, and worse without .get()."""
    lesson, run, pair = blocks("The lesson")
    code = [line for line in lesson.splitlines() if line and line[0] != "#"]
    assert f"are {len(code)} lines of code" in README
    (tmp_path / "lesson.py").write_text(lesson)
    one = shell(run)
    one.sees(r"members: \{b'A'\}")
    one.send("\x03")
    one.sees("Traceback", "KeyboardInterrupt")
    shell(run).sees("MemberAlreadyExist")
    step3 = "coordinator.join_group(group.encode())"
    (tmp_path / "lesson.py").write_text(lesson.replace(f"{step3}.get()", step3))
    first, second = pair.splitlines(keepends=True)
    b = shell(first)
    b.sees("members: .*b'B'")
    shell(second.strip() + "; echo status $?\n").sees("members: .*b'B'", "status 0")
    b.sees("MemberNotJoined")


def test_list(shell, tmp_path):
    """Members share ten jobs; a third one moves six of them."""
    members, commands = blocks("Use the list")
    a_joins, b_joins, run = commands.splitlines(keepends=True)
    (tmp_path / "members.py").write_text(members.replace("/tmp/", f"{tmp_path}/"))
    a = shell(a_joins)
    shell(b_joins).sees("members: A, B\n")
    shell(run).sees(re.escape(*blocks("Use the list", "text")))
    shell(a_joins.replace(" A ", " C "))
    a.sees("members: A, B, C")
    shell(run).sees(re.escape("[0, 3, 6, 9]\nb'B' [1, 4, 7]\nb'C' [2, 5, 8]\n"))


def test_break_it(shell):
    """Suspend, cut, restart: what A and B say."""
    a_joins, b_joins, gateway, b_joins_it, on_memcached = blocks("Break it")
    servers = [blocks(f"With {name}")[0] for name in ("etcd", "memcached")]
    etcd, memcached = (shell(QUIET, server) for server in servers)
    a, b, connection = shell(), shell(), shell(gateway)
    a.joins(a_joins, "clientA")
    for joins, cut in (b_joins, b), (b_joins_it, connection):
        b.joins(joins, "clientA", "clientB")
        b.sees(STARTS)
        a.sees("clientB joined")
        cut.send("\x1a")
        a.sees("clientB gone")
        cut.send("fg\n")
        b.sees(STOPS, STARTS)
        a.sees("clientB joined")
        b.leaves()
        a.sees("clientB gone")
    for server, start, gone in zip((etcd, memcached), servers, (False, True)):
        known = len(a.transcript)
        server.send("\x03")
        a.sees("backend error", STOPS)
        server.types(start)
        a.sees("backend is back", STARTS)
        assert ("clientA gone" in a.transcript[known:]) is gone
        a.leaves()
        if not gone:
            a.joins(on_memcached, "clientA")
            a.sees(STARTS)


def test_two_machines(shell):
    """The servers listen where they are told, here at 127.0.0.1."""
    servers = blocks("Two machines")[0].splitlines(keepends=True)
    urls = "etcd3+http://192.0.2.1", "memcached://192.0.2.1:11211"
    told = "unset ETCD_LISTEN_CLIENT_URLS ETCD_ADVERTISE_CLIENT_URLS\n"  # By the page.
    for server, url in zip(servers, urls):
        shell(QUIET, told, server)
        shell().joins(f"python {SCRIPT.name} A group1 {url} --wait 0\n", "A")


def test_uv(shell):
    """uv needs no environment."""
    a = shell(re.search(r"`(uv run .*?)`", README)[1] + " file:///tmp/tooz\n")
    a.timeout = 240  # It downloads the packages.
    a.sees("4. members: clientA\n")


def test_every_section_has_a_test():
    """Only the last one has none: it runs this."""
    asked = re.findall(r' blocks\("(.+?)"\)', pathlib.Path(__file__).read_text())
    assert {*asked, "Tests"} == {heading for heading in SECTIONS if blocks(heading)}


@on("files")
def test_picture(backend, start):
    """The scene is played; the picture shows just its lines."""
    url = backend.url(timeout=5)
    a, *twice = picture.play(lambda name: start(name, url))
    played = {"clientA": [a], "clientB": twice}
    for name, programs in played.items():
        text = "".join(one.transcript for one in programs)
        shown = "\n".join(picture.story()[name])
        assert said(text.replace(backend.url(), "file:///tmp/tooz")) == said(shown)
