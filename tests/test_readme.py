"""The README cannot rot: its commands are typed, in real terminals, and do what it says."""

import collections
import os
import re
import shutil
import subprocess
import sys
import textwrap

import pexpect
import picture
import pytest
from conftest import CLOCK, README, SCRIPT, Program, free_port, on, screen, wait_until
from test_faults import EXPIRY, ROWS

# Each block of commands or of Python, and the output that follows it.
SHOWN = {
    textwrap.dedent(text): output
    for text, output in re.findall(
        r"(?ms)^ *```(?:sh|python)\n(.*?)^ *```$(?:(?:\n|[^\n`]*\n){,4}?```text\n(.*?)^```$)?",
        README,
    )
}
REST = [*SHOWN]
# Nobody reads a server's log, and a terminal that is full would stop it.
QUIET = "exec >/dev/null 2>&1\n"
PORTS = r"\b(2379|2380|23790|23791|11211)\b"
# What uses a default port says so: a pattern, and what to add.
EXPLICIT = {
    r"^etcd --data-dir \S+$": " --listen-client-urls http://127.0.0.1:2379"
    " --advertise-client-urls http://127.0.0.1:2379",
    r"^etcd --data-dir .*": " --listen-peer-urls http://127.0.0.1:2380"
    " --initial-advertise-peer-urls http://127.0.0.1:2380"
    " --initial-cluster default=http://127.0.0.1:2380",
    r"^memcached .*": " -p 11211",
    r"etcd3\+http://[\w.]+(?=[ ?])": ":2379",
    r"etcdctl (?=get|lease|watch)": "--endpoints 127.0.0.1:2379 ",
}


class Shell(Program):
    """A terminal: one types what the page says, and it does that where it harms nobody.

    `folder` is in the place of /tmp, and `ports` has a port of our own for each.
    """

    def __init__(self, folder, ports, cwd):
        url = f"etcd3+http://localhost:{ports['2379']}"
        path = f"{sys.prefix}/bin:{os.environ['PATH']}"
        words = ["bash", "--noprofile", "--norc"]
        env = {**os.environ, "PATH": path, "TOOZ_BACKEND_URL": url}
        size = (24, 200)
        super().__init__(*words, terminal=True, env=env, cwd=cwd, dimensions=size)
        self.folder, self.ports = folder, ports

    def types(self, *texts):
        """Type these commands."""
        for text in texts:
            text = text.replace("192.0.2.1", "127.0.0.1")
            for pattern, more in EXPLICIT.items():
                text = re.sub(f"(?m){pattern}", rf"\g<0>{more}", text)
            text = re.sub(r"(?<=[123}])23(?=(79|80)\b)", "25", text)  # The cluster's.
            text = re.sub(PORTS, lambda port: str(self.ports[port[0]]), text)
            self.send(text.replace("/tmp/", f"{self.folder}/"))

    def joins(self, text, *members):
        """Type the command of a client, and again until its server is there."""
        listed = f"4. members: {', '.join(members)}\r\n"

        def joined():
            self.types(text)
            return self.expect([listed, "NO_PROXY"]) == 0

        wait_until(joined)

    def leaves(self):
        """Press Ctrl-C."""
        self.sees("remaining")
        self.send("\x03")
        self.sees("6. left")


def blocks(count):
    """Give a test the next blocks of the page: the tests stand in the page's order."""
    taken, REST[:count] = REST[:count], []
    return pytest.mark.parametrize("texts", [taken], ids=["page"])


def said_by(name, text):
    """Return the lines of a client, without what changes from run to run."""
    text = re.sub(CLOCK, "HH:MM:SS", text)
    return [line for line in text.splitlines() if line.startswith(f"{name}: ")]


def table(heading):
    """Return the rows of the page's table that begins so, as lists of cells."""
    rows = re.search(rf"(?m)^\| {heading} \|.*\n.*\n((\|.*\n)+)", README)[1]
    return [re.split(r" *\| *", row)[1:-1] for row in rows.splitlines()]


@pytest.fixture
def shell(programs, tmp_path):
    """Open terminals with shell(command, …), in a folder with a script and its packages."""
    ports = collections.defaultdict(free_port)
    (tmp_path / ".venv").symlink_to(sys.prefix)
    (tmp_path / SCRIPT.name).symlink_to(SCRIPT)

    def shell(*texts, cwd=tmp_path):
        one = programs(tmp_path, ports, cwd, kind=Shell)
        one.types(*texts)
        return one

    return shell


@blocks(4)
def test_try_it(tmp_path, shell, texts):
    """The first commands, in a folder with nothing else: a leave, a crash."""
    first, second, background, kill = texts
    clone = tmp_path / "clone"
    clone.mkdir()
    for name in "requirements.txt", SCRIPT.name:
        shutil.copy(SCRIPT.parent / name, clone)
    a = shell(first, cwd=clone)
    a.timeout = 240  # pip takes its time.
    a.sees("4. members: clientA\n")
    b = shell(second, cwd=clone)
    b.sees("4. members: clientA, clientB\n", "remaining, heartbeats: ")
    b.leaves()
    a.sees("clientB joined", "clientB gone")
    b.types(background)
    a.sees("clientB joined")
    b.types(kill)
    a.sees("clientB gone")
    shown = "\n".join(screen(a.transcript, 200)).replace(str(tmp_path), "/tmp")
    assert said_by("clientA", shown) == said_by("clientA", SHOWN[kill])


@blocks(10)
def test_lesson(shell, tmp_path, texts):
    """The bare lesson fails as the page says; the list is used; the exercises' solutions."""
    lesson, run, listing, members, a_joins, b_joins, jobs, c_joins, *solutions = texts
    by_name, again = solutions
    assert f"in {sum(map(bool, lesson.splitlines()))} lines" in README
    files = tmp_path / "lesson.py", tmp_path / "members.py"
    for file, text in zip(files, (lesson, listing)):
        file.write_text(text.replace("/tmp/", f"{tmp_path}/"))

    def prints(*patterns):
        """Run members.py; tell whether that is what it prints."""
        shown = subprocess.check_output(
            ["bash", "-c", members], cwd=tmp_path, text=True
        )
        return re.fullmatch("\n".join([*patterns, ""]), shown)

    shell(members).sees("GroupNotCreated")
    for name in "A", "B":
        one = shell(run.replace(" A ", f" {name} "))
        one.sees(f"members: .*b'{name}'")
        one.send("\x03")
        one.sees("Traceback", "KeyboardInterrupt")
    assert prints(r"\[(b'A', )?b'B'\]")
    wait_until(lambda: prints(r"\[\]"))
    shell(run).sees("MemberAlreadyExist")

    a, b = shell(a_joins), shell(b_joins)
    a.sees("B joined, members: A, B|4. members: A, B")
    with files[1].open("a") as file:
        file.write(jobs + by_name)
    shares = r"b'A' \[0, 2, 4, 6, 8\]", r"b'B' \[1, 3, 5, 7, 9\]"
    assert prints(r"\[b'A', b'B'\]", *shares, "b'[AB]'")
    c = shell(c_joins)
    c.sees("4. members: A, B, C")
    shares = r"b'A' \[0, 3, 6, 9\]", r"b'B' \[1, 4, 7\]", r"b'C' \[2, 5, 8\]"
    assert prints(r"\[b'A', b'B', b'C'\]", *shares, "b'[ABC]'")
    for one in a, b, c:
        one.leaves()

    step3 = "coordinator.join_group(group.encode())"
    files[0].write_text(files[0].read_text().replace(f"{step3}.get()", step3))
    a = shell(run.replace(" 60", " 20"))
    a.sees(r"members: \{b'A'\}")
    shell(again.strip() + "; echo status $?\n").sees(r"members: \{b'A'\}", "status 0")
    a.sees("MemberNotJoined")


@blocks(6)
def test_etcd(shell, texts):
    """With etcd: look at the keys, the lease, and the events."""
    etcd, a_joins, b_joins, keys, leases, watch = texts
    shell(QUIET, etcd)
    a, b, events = shell(), shell(), shell()
    a.joins(a_joins, "clientA")
    b.joins(b_joins, "clientA", "clientB")
    shell(keys).sees(*SHOWN[keys].split())
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


@blocks(4)
def test_memcached(shell, texts):
    """With memcached: look at the keys."""
    memcached, a_joins, b_joins, keys = texts
    shell(QUIET, memcached)
    shell().joins(a_joins, "clientA")
    shell().joins(b_joins, "clientA", "clientB")
    # Older versions of Tooz store no capabilities as b"", newer ones as None.
    shown = re.escape(SHOWN[keys].strip()).replace(r"\\xc0", r"\\x(c0|c4\\x00)")
    shell(keys).sees(shown)


@blocks(5)
def test_break_it(shell, texts):
    """Suspend, cut, restart: what A and B say."""
    a_joins, suspend, gateway, b_joins, on_memcached = texts
    start_etcd = "etcd --data-dir /tmp/etcd-data\n"
    start_memcached = "memcached -u nobody\n"
    etcd, memcached = shell(QUIET, start_etcd), shell(QUIET, start_memcached)
    a, b = shell(), shell()
    a.joins(a_joins, "clientA")
    b.types(suspend)
    a.sees(*["clientB joined", "clientB gone"] * 2)
    b.sees(f"{EXPIRY}|clientB gone", "clientB joined", "clientB: 6. left")

    connection = shell(gateway)
    b.joins(b_joins, "clientA", "clientB")
    a.sees("clientB joined")
    connection.send("\x1a")
    b.sees("backend error: ", EXPIRY)
    a.sees("clientB gone")
    connection.send("fg\n")
    b.sees("backend is back", "clientB joined")
    a.sees("clientB joined")
    b.leaves()
    a.sees("clientB gone")

    etcd.send("\x03")
    a.sees("backend error")
    etcd.types(start_etcd)
    a.sees("backend is back")
    a.leaves()
    a.joins(on_memcached, "clientA")
    memcached.send("\x03")
    a.sees("backend error")
    memcached.types(start_memcached)
    a.sees("backend is back", "clientA joined")


@blocks(1)
def test_uv(shell, texts):
    """uv needs no environment."""
    a = shell(*texts)
    a.timeout = 240  # It downloads the packages.
    a.sees("4. members: clientA\n")


@blocks(2)
def test_two_machines(shell, texts):
    """The servers listen where they are told, here at 127.0.0.1."""
    for text, url in zip(
        texts, ("etcd3+http://192.0.2.1", "memcached://192.0.2.1:11211")
    ):
        shell(QUIET, text)
        shell().joins(f".venv/bin/python {SCRIPT.name} A group1 {url} --wait 0\n", "A")


@blocks(4)
def test_cluster(shell, texts):
    """The leader is killed: the others elect a new one, and nobody is gone."""
    start, a_joins, status, kill = texts
    nodes, a, leader = shell(start), shell(), shell()
    a.joins(a_joins, "clientA")
    leader.types(status)
    leader.sees(r"127.0.0.1:\d2579[^\n]* true ")
    nodes.types(kill.replace("N", f"{leader.match[0][10]}"))
    shell().joins(a_joins.replace("clientA", "clientB"), "clientA", "clientB")
    a.sees("clientB joined, members: clientA, clientB\n")
    assert "clientA gone" not in a.transcript


def test_every_block_has_a_test():
    """Only the last one has none: it runs this."""
    assert REST == ["tests/run\n"]


def test_table():
    """The page promises what the tests try, word for word."""
    assert table("what happens") == ROWS


def test_names_of_functions():
    """The page tells which function handles what."""
    functions = re.findall(r"(?m)^def (\w+)", SCRIPT.read_text())
    for *_, name in table("shortcoming of the 21 lines"):
        assert name.strip("`()") in functions


@on("files")
def test_picture(backend, start):
    """The scene is played; the picture shows just its lines."""
    url = backend.url(timeout=5)
    a, *twice = picture.play(lambda name: start(name, url))
    played = {"A": a.transcript, "B": "".join(one.transcript for one in twice)}
    for name, text in played.items():
        text = text.replace("group1", "g").replace(backend.url(), "file:///tmp/t")
        assert said_by(name, text) == said_by(name, "\n".join(picture.story()[name]))
