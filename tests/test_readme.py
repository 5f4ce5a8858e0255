"""The README cannot rot: its commands are typed, in real terminals, and do what it says."""

import collections
import os
import re
import shutil
import sys
import textwrap

import pexpect
import picture
import pytest
from conftest import CLOCK, README, SCRIPT, Program, free_port, on, wait_until
from test_faults import STARTS, STOPS

# The blocks under each heading: a language, and a text.
SECTIONS = {
    section.partition("\n")[0]: [
        (language, textwrap.dedent(text))
        for language, text in re.findall(r"(?ms)^ *```(\w+)\n(.*?)^ *```$", section)
    ]
    for section in README.split("\n## ")[1:]
}


def page(heading):
    """Give a test the blocks under a heading of the page that are typed or saved."""
    blocks = [text for language, text in SECTIONS[heading] if language != "text"]
    return pytest.mark.parametrize("blocks", [blocks], ids=[heading])


def test_every_section_has_a_test():
    """Only the last one has none: it runs this."""
    marks = [
        mark for one in globals().values() for mark in getattr(one, "pytestmark", [])
    ]
    tried = {mark.kwargs["ids"][0] for mark in marks if mark.args[0] == "blocks"}
    assert {*tried, "Tests"} == {
        heading for heading, blocks in SECTIONS.items() if blocks
    }


class Shell(Program):
    """A terminal: one types what the page says, and it does that where it harms nobody.

    `folder` is in the place of /tmp, and `ports` has a port of our own for each.
    """

    def __init__(self, folder, ports, cwd):
        urls = f"http://localhost:{ports['2379']}", f"http://localhost:{ports['2380']}"
        more = {
            "PATH": f"{sys.prefix}/bin:{os.environ['PATH']}",
            "TOOZ_BACKEND_URL": f"etcd3+{urls[0]}",
            "ETCDCTL_ENDPOINTS": urls[0],
            "ETCD_LISTEN_CLIENT_URLS": urls[0],
            "ETCD_ADVERTISE_CLIENT_URLS": urls[0],
            "ETCD_LISTEN_PEER_URLS": urls[1],
            "ETCD_INITIAL_ADVERTISE_PEER_URLS": urls[1],
            "ETCD_INITIAL_CLUSTER": f"default={urls[1]}",
        }
        words, size = ["bash", "--noprofile", "--norc"], (24, 200)
        env = {**os.environ, **more}
        super().__init__(*words, terminal=True, env=env, cwd=cwd, dimensions=size)
        self.folder, self.ports = folder, ports

    def types(self, *texts):
        """Type these commands, with our ports and our folder."""
        for text in texts:
            text = re.sub(r"etcd3\+http://[\w.]+(?=[ ?])", r"\g<0>:2379", text)
            text = re.sub(r"(?m)^memcached .*", r"\g<0> -p 11211", text)
            ports = r"\b(2379|23790|11211)\b"
            text = re.sub(ports, lambda port: str(self.ports[port[0]]), text)
            text = text.replace("192.0.2.1", "127.0.0.1")
            self.send(text.replace("/tmp/", f"{self.folder}/"))

    def joins(self, text, *members):
        """Type the command of a client, and again until its server is there."""

        def joined():
            self.types(text)
            return (
                self.expect([f"4. members: {', '.join(members)}\r\n", "NO_PROXY"]) == 0
            )

        wait_until(joined)

    def leaves(self):
        """Press Ctrl-C."""
        self.sees("remaining")
        self.send("\x03")
        self.sees("6. left")


@pytest.fixture
def shell(programs, tmp_path):
    """Open terminals with shell(command, …), in a folder with the script."""
    ports = collections.defaultdict(free_port)
    (tmp_path / SCRIPT.name).symlink_to(SCRIPT)

    def shell(*texts, cwd=tmp_path):
        one = programs(tmp_path, ports, cwd, kind=Shell)
        one.types(*texts)
        return one

    return shell


# Nobody reads a server's log, and a terminal that is full would stop it.
QUIET = "exec >/dev/null 2>&1\n"


def said(text):
    """Return the script's lines in a text, without the time, which changes."""
    return re.findall(f"(?<!# ){CLOCK} (.*)", text)


@page("Try it")
def test_try_it(tmp_path, shell, blocks):
    """The first commands, in a folder with nothing else: a leave, a crash, the transcript."""
    first, second, background, kill = blocks
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
    transcript = next(text for kind, text in SECTIONS["Try it"] if kind == "text")
    assert said(a.transcript.replace(str(tmp_path), "/tmp")) == said(transcript)


@page("With etcd")
def test_etcd(shell, blocks):
    """Look at the keys, the lease, and the events."""
    etcd, clients, keys, leases, watch = blocks
    a_joins, b_joins = clients.splitlines(keepends=True)
    shell(QUIET, etcd)
    a, b, events = shell(), shell(), shell()
    a.joins(a_joins, "clientA")
    b.joins(b_joins, "clientA", "clientB")
    shell(keys).sees(
        *[f"tooz/groups/group1/{key}\n" for key in ("", "clientA", "clientB")]
    )
    shell(leases).sees(r"TTL\(30s\), remaining\(\d+s\), attached keys\(\[too.*tA")
    events.types(watch)
    while events.expect(["PUT", pexpect.TIMEOUT], timeout=2) == 1:  # Not yet watching.
        shell(a_joins.replace("clientA", "clientC")).leaves()
    b.leaves()
    events.sees("DELETE\n", "tooz/groups/group1/clientB")
    b.types(b_joins.replace("\n", " &\n"))
    events.sees("PUT\n", "tooz/groups/group1/clientB")
    b.types("kill -9 %1\n")
    events.sees("DELETE\n", "tooz/groups/group1/clientB")


@page("With memcached")
def test_memcached(shell, blocks):
    """B is killed; A removes it when its lease has expired."""
    memcached, clients = blocks
    a_joins, b_joins = clients.splitlines(keepends=True)
    shell(QUIET, memcached)
    a, b = shell(), shell()
    a.joins(a_joins, "clientA")
    b.types(b_joins)
    a.sees("clientB joined")
    b.types("kill -9 %1\n")
    a.sees("clientB gone")


@page("The lesson")
def test_lesson(shell, tmp_path, blocks):
    """The bare lesson fails as the page says, and worse without .get()."""
    lesson, run, pair = blocks
    code = [line for line in lesson.splitlines() if line and line[0] != "#"]
    assert f"are {len(code)} lines of code" in README
    file = tmp_path / "lesson.py"
    file.write_text(lesson)
    one = shell(run)
    one.sees(r"members: \{b'A'\}")
    one.send("\x03")
    one.sees("Traceback", "KeyboardInterrupt")
    shell(run).sees("MemberAlreadyExist")

    step3 = "coordinator.join_group(group.encode())"
    file.write_text(lesson.replace(f"{step3}.get()", step3))
    first, second = pair.splitlines(keepends=True)
    b = shell(first)
    b.sees(r"members: \{.*b'B'.*\}")
    shell(second.strip() + "; echo status $?\n").sees(r"members: \{.*b'B'", "status 0")
    b.sees("MemberNotJoined")


@page("Use the list")
def test_list(shell, tmp_path, blocks):
    """Members share ten jobs; a third one moves six of them."""
    members, commands = blocks
    a_joins, b_joins, run = commands.splitlines(keepends=True)
    (tmp_path / "members.py").write_text(members.replace("/tmp/", f"{tmp_path}/"))

    shown = next(text for kind, text in SECTIONS["Use the list"] if kind == "text")
    a, _ = shell(a_joins), shell(b_joins)
    a.sees("members: A, B\n")
    shell(run).sees(re.escape(shown))
    c = shell(a_joins.replace(" A ", " C "))
    c.sees("4. members: A, B, C")
    shell(run).sees(re.escape("[0, 3, 6, 9]\nb'B' [1, 4, 7]\nb'C' [2, 5, 8]\n"))


@page("Break it")
def test_break_it(shell, blocks):
    """Suspend, cut, restart: what A and B say."""
    a_joins, b_joins, gateway, b_joins_it, on_memcached = blocks
    servers = [SECTIONS[f"With {name}"][0][1] for name in ("etcd", "memcached")]
    etcd, memcached = (shell(QUIET, server) for server in servers)
    a, b = shell(), shell()
    a.joins(a_joins, "clientA")
    b.types(b_joins)
    a.sees("clientB joined")
    b.sees(STARTS)
    b.send("\x1a")
    a.sees("clientB gone")
    b.types("fg\n")
    b.sees(STOPS, STARTS)
    a.sees("clientB joined")
    b.leaves()
    a.sees("clientB gone")

    connection = shell(gateway)
    b.joins(b_joins_it, "clientA", "clientB")
    b.sees(STARTS)
    a.sees("clientB joined")
    connection.send("\x1a")
    b.sees(STOPS)
    a.sees("clientB gone")
    connection.send("fg\n")
    b.sees(STARTS)
    a.sees("clientB joined")
    b.leaves()
    a.sees("clientB gone")

    for server, start, gone in zip((etcd, memcached), servers, (False, True)):
        known = len(a.transcript)
        server.send("\x03")
        a.sees("backend error", STOPS)
        server.types(start)
        a.sees("backend is back", *["clientA gone", "clientA joined"] * gone, STARTS)
        assert ("clientA gone" in a.transcript[known:]) is gone
        a.leaves()
        if not gone:
            a.joins(on_memcached, "clientA")
            a.sees(STARTS)


@page("Two machines")
def test_two_machines(shell, blocks):
    """The servers listen where they are told, here at 127.0.0.1."""
    urls = "etcd3+http://192.0.2.1", "memcached://192.0.2.1:11211"
    for server, url in zip(blocks[0].splitlines(keepends=True), urls):
        # Or etcd would refuse to be told twice.
        shell(
            QUIET, "unset ETCD_LISTEN_CLIENT_URLS ETCD_ADVERTISE_CLIENT_URLS\n", server
        )
        shell().joins(f"python {SCRIPT.name} A group1 {url} --wait 0\n", "A")


def test_uv(shell):
    """uv needs no environment."""
    a = shell(re.search(r"`(uv run .*?)`", README)[1] + " file:///tmp/tooz\n")
    a.timeout = 240  # It downloads the packages.
    a.sees("4. members: clientA\n")


def test_names():
    """The page says what in the script does what."""
    text = SCRIPT.read_text()
    for name in re.findall(r"\(`(\w+)(?:\(\))?`\)", README):
        assert f"def {name}(" in text or f"class {name}:" in text


@on("files")
def test_picture(backend, start):
    """The scene is played; the picture shows just its lines."""
    url = backend.url(timeout=5)
    a, *twice = picture.play(lambda name: start(name, url))
    played = {
        "clientA": a.transcript,
        "clientB": "".join(one.transcript for one in twice),
    }
    for name, text in played.items():
        text = text.replace(backend.url(), "file:///tmp/tooz")
        assert said(text) == said("\n".join(picture.story()[name]))
