"""The README cannot rot: its commands are typed, in real terminals, and do what it says."""

import os
import re
import shutil
import subprocess
import sys
import textwrap

import pexpect
import picture
import pytest
from conftest import (
    CLOCK,
    LIMIT,
    README,
    ROOT,
    SCRIPT,
    free_port,
    on,
    screen,
    table,
    wait_until,
)
from test_faults import EXPIRY, ROWS

# Each block of commands or of Python, and the output that follows it.
BLOCKS = [
    (textwrap.dedent(text), output)
    for text, output in re.findall(
        r"(?ms)^ *```(?:sh|python)\n(.*?)^ *```$(?:(?:\n|[^\n`]*\n){,4}?```text\n(.*?)^```$)?",
        README,
    )
]
REST = [text for text, _ in BLOCKS]
# Nobody reads a server's log, and a terminal that is full would stop it.
QUIET = "exec >/dev/null 2>&1\n"


def elsewhere(folder):
    """Return what to replace in the page's commands, so that they harm nobody else.

    /tmp is a folder of the test's own, and the servers get ports of their own.
    """
    client, peer, *gateways, cache = (free_port() for _ in range(5))
    at = f"http://127.0.0.1:{client}"
    peers = f"http://127.0.0.1:{peer} --initial-cluster default=http://127.0.0.1:{peer}"
    flags = f"--listen-peer-urls http://127.0.0.1:{peer} --initial-advertise-peer-urls {peers}"
    return client, [
        (r"/tmp/", f"{folder}/"),
        (r"192\.0\.2\.1", "127.0.0.1"),
        (
            r"^etcd --data-dir (\S+)$",
            rf"etcd --data-dir \1 --listen-client-urls {at} --advertise-client-urls {at}",
        ),
        (r"^(etcd --data-dir .*)$", rf"\1 {flags}"),
        (r"^(memcached .*)$", rf"\1 -p {cache}"),
        (r"(etcd3\+http://[\w.]+)(?=[ ?])", rf"\1:{client}"),
        (r"etcdctl (?=get|lease|watch)", f"etcdctl --endpoints 127.0.0.1:{client} "),
        (r":2379\b", f":{client}"),
        (r":23790", f":{gateways[0]}"),
        (r":23791", f":{gateways[1]}"),
        (r"11211", f"{cache}"),
        (r"(?<=[123}])23(?=(79|80)\b)", "41"),
    ]


def blocks(count):
    """Give a test the next blocks of the page: each block has just one test."""
    taken, REST[:count] = REST[:count], []
    return pytest.mark.parametrize("block", [taken], ids=["page"])


def output(text):
    """Return what the page shows after that block."""
    return next(shown for block, shown in BLOCKS if block == text)


def said_by(name, text):
    """Return the lines of a client, without what changes from run to run."""
    text = re.sub(CLOCK, "HH:MM:SS", text.replace("\r", ""))
    return [line for line in text.splitlines() if line.startswith(f"{name}: ")]


@pytest.fixture
def shell(programs, tmp_path):
    """Open terminals with shell(command, …), and type what the page says, elsewhere()."""
    path = f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"
    port, changes = elsewhere(tmp_path)
    ours = {"PATH": path, "TOOZ_BACKEND_URL": f"etcd3+http://localhost:{port}"}

    def shell(*commands, cwd=ROOT, python=sys.executable):
        words = ["bash", "--noprofile", "--norc"]
        env = {**os.environ, **ours}
        one = programs(*words, terminal=True, columns=200, cwd=cwd, env=env)

        def type_in(text):
            for pattern, other in changes:
                text = re.sub(f"(?m){pattern}", other, text)
            one.send(text.replace(".venv/bin/python", python))

        one.types = type_in
        for text in commands:
            one.types(text)
        return one

    return shell


def leave(*clients):
    """Press Ctrl-C in their terminals; wait until they have left."""
    for one in clients:
        one.sees("remaining")
        one.send("\x03")
        one.sees("6. left")


@blocks(4)
def test_try_it(tmp_path, shell, block):
    """The first commands, in a folder with nothing but what git has: a leave, a crash."""
    first, second, background, kill = block
    files = subprocess.check_output(["git", "ls-files", "-z"], cwd=ROOT, text=True)
    for name in files.split("\0")[:-1]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    where = {"cwd": tmp_path, "python": ".venv/bin/python"}
    a = shell(first, **where)
    a.expect("4. members: clientA\r\n", timeout=4 * LIMIT)
    b = shell(second, **where)
    a.sees("clientB joined")
    b.sees("4. members: clientA, clientB\r\n", "remaining, heartbeats: ")
    b.send("\x03")
    a.sees("clientB gone")
    b.sees("6. left")
    b.types(background)
    a.sees("clientB joined")
    b.types(kill)
    a.sees("clientB gone")
    shown = "\n".join(screen(a.transcript, 200)).replace(str(tmp_path), "/tmp")
    assert said_by("clientA", shown) == said_by("clientA", output(kill))


@blocks(9)
def test_lesson(shell, tmp_path, block):
    """The bare lesson fails as the page says; the list is used; the exercises' solutions."""
    lesson, run, listing, members, a_joins, b_joins, jobs, by_name, again = block
    assert f"in {sum(map(bool, lesson.splitlines()))} lines" in README
    files = tmp_path / "lesson.py", tmp_path / "members.py"
    for file, text in zip(files, (lesson, listing)):
        file.write_text(text.replace("/tmp/", f"{tmp_path}/"))

    def prints(*patterns):
        """Run members.py; tell whether that is what it prints."""
        words = ["bash", "-c", members.replace(".venv/bin/python", sys.executable)]
        shown = subprocess.check_output(words, cwd=tmp_path, text=True)
        return re.fullmatch("\n".join([*patterns, ""]), shown)

    shell(members, cwd=tmp_path).sees("GroupNotCreated")
    a = shell(run, cwd=tmp_path)
    a.sees(r"members: \{b'A'\}\r\n")
    a.send("\x03")
    a.sees("Traceback", "KeyboardInterrupt")
    shell(run, cwd=tmp_path).sees("MemberAlreadyExist")
    b = shell(run.replace(" A ", " B "), cwd=tmp_path)
    b.sees("members: ")
    wait_until(lambda: prints(r"\[b'B'\]"))  # A's lease has expired.
    b.send("\x03")
    b.sees("Traceback")
    assert prints(r"\[b'B'\]")
    wait_until(lambda: prints(r"\[\]"))
    shell(run, cwd=tmp_path).sees("MemberAlreadyExist")

    a = shell(a_joins)
    a.sees("4. members: A\r\n")
    b = shell(b_joins)
    b.sees("4. members: A, B\r\n")
    with files[1].open("a") as file:
        file.write(jobs + by_name)
    shares = r"b'A' \[0, 2, 4, 6, 8\]", r"b'B' \[1, 3, 5, 7, 9\]"
    assert prints(r"\[b'A', b'B'\]", *shares, "(b'A'|b'B')")
    leave(a, b)

    step3 = "coordinator.join_group(group.encode())"
    files[0].write_text(lesson.replace(f"{step3}.get()", step3))
    a = shell(run.replace(" 60", " 15"), cwd=tmp_path)
    a.sees(r"members: \{b'A'\}\r\n")
    b = shell(again.strip() + "; echo status $?\n", cwd=tmp_path)
    b.sees(r"members: \{b'A'\}\r\n", "status 0")
    a.sees("MemberNotJoined")


@blocks(6)
def test_etcd(shell, block):
    """With etcd: look at the keys, the lease, and the events."""
    etcd, a_joins, b_joins, keys, leases, watch = block
    shell(QUIET, etcd)
    a = shell(a_joins)
    while a.expect(["4. members: clientA\r\n", "NO_PROXY"]) == 1:  # Not yet there.
        a.types(a_joins)
    b = shell(b_joins)
    a.sees("clientB joined")
    shown = shell(keys)
    shown.sees(*filter(None, output(keys).splitlines()))
    shell(leases).sees(r"TTL\(30s\), remaining\(\d+s\), attached keys\(\[too.*tA")
    events = shell(watch)
    while events.expect(["PUT", pexpect.TIMEOUT], timeout=2) == 1:  # Not yet watching.
        leave(shell(a_joins.replace("clientA", "clientC")))
    leave(b)
    events.sees("DELETE\r\n", "tooz/groups/group1/clientB")
    b.types(b_joins.replace("\n", " &\n"))
    events.sees("PUT\r\n", "tooz/groups/group1/clientB")
    b.types("kill -9 %1\n")
    events.sees("DELETE\r\n", "tooz/groups/group1/clientB")
    leave(a)


@blocks(4)
def test_memcached(shell, block):
    """With memcached: look at the keys."""
    memcached, a_joins, b_joins, keys = block
    shell(QUIET, memcached)
    a = shell(a_joins)
    while a.expect(["4. members: clientA\r\n", "NO_PROXY"]) == 1:
        a.types(a_joins)
    b = shell(b_joins)
    a.sees("clientB joined")
    # Older versions of Tooz store no capabilities as b"", newer ones as None.
    shown = re.escape(output(keys).strip()).replace(r"\\xc0", r"\\x(c0|c4\\x00)")
    shell(keys).sees(shown)
    leave(a, b)


@blocks(5)
def test_break_it(shell, block):
    """Suspend, cut, restart: what A and B say."""
    a_joins, suspend, gateway, b_joins, on_memcached = block
    servers = {}
    for name, text in (
        ("etcd", "etcd --data-dir /tmp/e\n"),
        ("memcached", "memcached -u nobody\n"),
    ):
        servers[name] = shell(QUIET, text), text
    a = shell(a_joins)
    while a.expect(["4. members: clientA\r\n", "NO_PROXY"]) == 1:
        a.types(a_joins)
    b = shell(suspend)
    a.sees(*["clientB joined", "clientB gone"] * 2)
    b.sees(f"{EXPIRY}|clientB gone", "clientB joined", "clientB: 6. left")

    connection = shell(gateway)
    b = shell(b_joins)
    while b.expect(["4. members: clientA, clientB\r\n", "NO_PROXY"]) == 1:
        b.types(b_joins)
    a.sees("clientB joined")
    connection.send("\x1a")
    b.sees("backend error: ", EXPIRY)
    a.sees("clientB gone")
    connection.send("fg\n")
    b.sees("backend is back", "clientB joined")
    a.sees("clientB joined")
    leave(b)
    a.sees("clientB gone")

    for name, outcome in (
        ("etcd", []),
        ("memcached", ["clientA joined"]),
    ):
        server, text = servers[name]
        if name == "memcached":
            leave(a)
            a = shell(on_memcached)
            a.sees("4. members: clientA\r\n")
        server.send("\x03")
        a.sees("backend error")
        server.types(text)
        a.sees("backend is back", *outcome)
    leave(a)


@blocks(1)
def test_uv(shell, block):
    """uv needs no environment."""
    a = shell(block[0])
    a.expect("4. members: clientA\r\n", timeout=4 * LIMIT)
    leave(a)


@blocks(2)
def test_two_machines(shell, block):
    """The servers listen where they are told, here at 127.0.0.1."""
    for text, url in zip(
        block, ("etcd3+http://192.0.2.1", "memcached://192.0.2.1:11211")
    ):
        shell(QUIET, text)
        join = f".venv/bin/python {SCRIPT.name} A group1 {url} --wait 0\n"
        a = shell(join)
        while a.expect(["6. left", "NO_PROXY"]) == 1:
            a.types(join)


@blocks(4)
def test_cluster(shell, block):
    """The commands of the cluster; one node is killed."""
    start, a_joins, leader, kill = block
    nodes = shell(start)
    a = shell(a_joins)
    while a.expect(["4. members: clientA\r\n", "NO_PROXY"]) == 1:
        a.types(a_joins)
    shell(leader).sees("IS LEADER", ":34179")
    nodes.types(kill)
    b = shell(a_joins.replace("clientA", "clientB"))
    while b.expect(["4. members: clientA, clientB\r\n", "NO_PROXY"]) == 1:
        b.types(a_joins.replace("clientA", "clientB"))
    a.sees("clientB joined, members: clientA, clientB\r\n")
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


def test_links():
    """Links resolve."""
    titles = re.findall(r"(?m)^#+ (.*)$", README.lower())
    anchors = {re.sub(r"[^a-z0-9-]", "", one.replace(" ", "-")) for one in titles}
    for link in re.findall(r"\]\((?!https://)([^)]+)\)", README):
        assert link.strip("#") in anchors or (ROOT / link).exists()
