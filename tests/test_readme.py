"""The README cannot rot: what it shows is run, and what it says is looked up."""

import ast
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import textwrap

import picture
import pytest
from conftest import (
    GROUP,
    LIMIT,
    README,
    ROOT,
    SCRIPT,
    on,
    run,
    screen,
    suspend,
    table,
    wait_until,
)
from test_faults import UNTRIED

BLOCKS = [
    (kind, textwrap.dedent(text))
    for _, kind, text in re.findall(r"(?ms)^( *)```(\w+)\n(.*?)^\1```$", README)
]
# Nobody reads a server's log, and a terminal that is full would stop it.
QUIET = "exec >/dev/null 2>&1\n"
DEFAULT_PORTS = pytest.mark.xdist_group("the default port of etcd")


def block(start, more=""):
    """Return the block that starts and goes on so, and the output that it shows."""
    starts = [text.startswith(start) and more in text for _, text in BLOCKS]
    kind, output = (*BLOCKS, ("", ""))[starts.index(True) + 1]
    return BLOCKS[starts.index(True)][1], output if kind == "text" else ""


def client(name, more=""):
    """Return the README's command that starts a client so, and with these options."""
    return block(f".venv/bin/python tooz_join_group.py {name}", more)[0]


def said_by(name, text):
    """Return the lines of a client, without what changes from run to run."""
    text = re.sub(r"\d\d:\d\d:\d\d", "HH:MM:SS", text.replace("\r", ""))
    return [line for line in text.splitlines() if line.startswith(f"{name}: ")]


def answers(port):
    """Tell whether somebody listens there."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture
def shell(programs, tmp_path):
    """Open terminals with shell(command, …), and type. /tmp is a folder of the test's own.

    What runs as a server there is ours, unless somebody's own has the port: use that.
    """
    path = f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"

    def shell(*commands, cwd=ROOT, python=sys.executable):
        words = ["bash", "--noprofile", "--norc"]
        where = {"cwd": cwd, "env": {**os.environ, "PATH": path}}
        one = programs(*words, terminal=True, columns=200, **where)
        for text in commands:
            text = text.replace("/tmp/", f"{tmp_path}/")
            one.send(text.replace(".venv/bin/python", python))
        return one

    return shell


def test_try_it(tmp_path, shell):
    """The first commands, in a folder with nothing but what git has: a leave, a crash."""
    files = subprocess.check_output(["git", "ls-files", "-z"], cwd=ROOT, text=True)
    for name in files.split("\0")[:-1]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    where = {"cwd": tmp_path, "python": ".venv/bin/python"}
    a = shell(block("python3 -m venv .venv && ")[0], **where)
    a.expect("4. members: clientA\r\n", timeout=4 * LIMIT)
    b = shell(client("clientB group1 'file:"), **where)
    a.sees("clientB joined")
    b.sees("4. members: clientA, clientB\r\n", "remaining")
    b.send("\x03")
    a.sees("clientB gone")
    b.sees("6. left")
    b.send(client("clientB group1 'file:", " &\n").replace("/tmp/", f"{tmp_path}/"))
    a.sees("clientB joined")
    b.send(block("kill -9 %1")[0])
    a.sees("clientB gone")
    _, output = block("kill -9 %1")
    shown = "\n".join(screen(a.transcript, 200)).replace(str(tmp_path), "/tmp")
    assert said_by("clientA", shown)[:-1] == said_by("clientA", output)


def test_uv(shell):
    """uv needs no environment."""
    a = shell(block("uv run")[0])
    a.expect("4. members: clientA\r\n", timeout=4 * LIMIT)
    a.send("\x03")
    a.sees("5. interrupted", "6. left")


def test_let_it_fail(shell, tmp_path):
    """The bare lesson fails as the page says; then the list is used."""
    lesson, _ = block("import sys\n")
    (tmp_path / "lesson.py").write_text(lesson)
    assert f"in {sum(map(bool, lesson.splitlines()))} lines" in README
    listing, _ = block("from tooz ")
    listing = listing.replace("/tmp/", f"{tmp_path}/")
    (tmp_path / "members.py").write_text(listing)
    commands = ".venv/bin/python lesson.py", ".venv/bin/python members.py"
    again, members = ([block(one)[0]] for one in commands)

    a = shell(*again, cwd=tmp_path)
    a.sees(r"members: \{b'A'\}\r\n")
    a.send("\x03")
    a.sees("Traceback", "KeyboardInterrupt")
    shell(*again, cwd=tmp_path).sees("MemberAlreadyExist")
    b = shell(again[0].replace(" A ", " B "), cwd=tmp_path)
    b.sees("members: ")
    b.send("\x03")
    wait_until(
        lambda: shell(*members, cwd=tmp_path).expect(["{b'B'}\r", "'A'|set"]) == 0
    )
    wait_until(lambda: shell(*members, cwd=tmp_path).expect(["set", "'B'}"]) == 0)
    shell(*again, cwd=tmp_path).sees("MemberAlreadyExist")

    a = shell(client("A lesson"))
    a.sees("A is taken", "4. members: A\r\n")
    shell(client("B lesson")).sees("B is taken", "4. members: A, B\r\n")
    a.sees("B joined, members: A, B")
    jobs, _ = block("members = sorted(")
    text = listing.replace("coordinator.stop()\n", f"{jobs}coordinator.stop()\n")
    (tmp_path / "members.py").write_text(text)
    shell(*members, cwd=tmp_path).sees(r"\[0, 2, 4, 6, 8\]\r\n")
    (tmp_path / "members.py").write_text(text.replace('b"A"', 'b"B"'))
    shell(*members, cwd=tmp_path).sees(r"\[1, 3, 5, 7, 9\]\r\n")


@on("etcd")
def test_bare_lesson(backend, programs):
    """It does what the script does; and it fails as the table says."""
    lesson, _ = block("import sys\n")
    words = sys.executable, "-c", lesson

    a = programs(*words, "A", GROUP, backend.url(timeout=5), "30")
    a.sees(r"members: \{b'A'\}\n")
    b = programs(*words, "B", GROUP, backend.url(), "0")
    b.sees(r"members: \{b'(A', b'B|B', b'A)'\}\n")
    b.ends(0)
    suspend(a.process)
    wait_until(
        lambda: "members: C\n" in run("C", GROUP, backend.url(), "--wait", "0").stdout
    )
    a.hit(signal.SIGCONT)
    a.sees("MemberNotJoined")
    down = [*words, "A", GROUP, "etcd3+http://localhost:1", "0"]
    done = subprocess.run(down, check=False, capture_output=True, text=True)
    assert len(done.stderr.splitlines()) > 50


def test_names_of_functions():
    """The page tells which function handles what."""
    functions = re.findall(r"(?m)^def (\w+)", SCRIPT.read_text())
    for *_, name in table("shortcoming of the 21 lines"):
        assert name.strip("`()") in functions


@DEFAULT_PORTS
def test_etcd(shell):
    """With etcd: look at the keys, then break it."""
    command, _ = block("etcd --data-dir")
    etcd = None if answers(2379) else shell(QUIET, command)
    wait_until(lambda: answers(2379))
    a = shell(client("clientA group1 --wait"))
    a.sees("lease: 30 s", "4. members: clientA\r\n", "lease .#")
    b = shell(client("clientB group1 etcd3+http://localhost "))
    a.sees("clientB joined")
    command, output = block("etcdctl get")
    assert subprocess.check_output(["bash", "-c", command], text=True) == output
    for one in a, b:
        one.send("\x03")
        one.sees("6. left")

    a = shell(client("clientA group1 'etcd3+http://127.0.0.1?"))
    a.sees("4. members: clientA\r\n")
    b = shell(client("clientB group1 'etcd3", "sleep 3; "))
    a.sees(*["clientB joined", "clientB gone"] * 2)
    b.sees("clientB: 3. joined again", "clientB: 6. left")

    gateway = shell(QUIET, block("etcd gateway start --endpoints")[0])
    wait_until(lambda: answers(23790))
    b = shell(client("clientB group1 'etcd3+http://127.0.0.1:23790"))
    a.sees("clientB joined")
    b.sees("lease .#")
    gateway.send("\x1a")
    a.sees("clientB gone")
    b.sees("backend error: ", "expired")
    gateway.send("fg\n")
    b.sees("3. joined again")
    a.sees("clientB joined")
    b.send("\x03")
    a.sees("clientB gone")

    if etcd:
        etcd.send("\x03")
        a.sees("backend error")
        etcd.send("!etcd\n")  # bash: once more.
        a.sees("backend is back, members: clientA\r\n")
        assert "3. joined again" not in a.transcript
    a.send("\x03")
    a.sees("6. left")


@DEFAULT_PORTS
def test_memcached(shell):
    """With memcached: look at the keys, then restart it."""
    command, _ = block("memcached -u memcache\n")
    memcached = None if answers(11211) else shell(QUIET, command)
    wait_until(lambda: answers(11211))
    a = shell(client("clientA group1 memcached:"))
    a.sees("4. members: clientA\r\n")
    b = shell(client("clientB group1 memcached:"))
    a.sees("clientB joined")
    command, output = block(".venv/bin/python -c")
    keys = ["bash", "-c", command.replace(".venv/bin/python", sys.executable)]
    # Older versions of Tooz store no capabilities as b"", newer ones as None.
    shown = subprocess.check_output(keys, text=True).replace(r"\xc4\x00", r"\xc0")
    assert shown == output
    for one in a, b:
        one.send("\x03")
        one.sees("6. left")
    a = shell(client("clientA group1 'memcached"))
    a.sees("4. members: clientA\r\n")
    if memcached:
        memcached.send("\x03")
        a.sees("backend error")
        memcached.send(block("memcached -u memcache\n")[0])
        a.sees("backend is back", "3. joined again\r\n", "4. members: clientA\r\n")
    a.send("\x03")
    a.sees("6. left")


def test_cluster(shell):
    """The commands of the cluster; one node is killed."""
    nodes = shell(block("for n in 1 2 3")[0])
    for port in 12379, 22379, 32379, 23791:
        wait_until(lambda port=port: answers(port))
    a = shell(client("clientA group1 'etcd3+http://127.0.0.1:23791"))
    a.sees("4. members: clientA\r\n")
    shell(block("etcdctl --endpoints")[0]).sees("IS LEADER", ":32379")
    nodes.send(block("kill -9 %1")[0])
    b = "clientB", GROUP, "etcd3+http://127.0.0.1:23791?timeout=10", "--wait", "1"
    wait_until(lambda: run(*b).returncode == 0)  # When the others have a leader.
    a.sees("clientB joined, members: clientA, clientB\r\n")
    assert "3. joined again" not in a.transcript


@on("file")
def test_picture(backend, start):
    """The scene is played; the picture shows just its lines."""
    url = backend.url(timeout=5)
    a, *twice = picture.play(lambda name: start(name, url))
    played = {"A": a.transcript, "B": "".join(one.transcript for one in twice)}
    for name, text in played.items():
        text = text.replace(GROUP, "g1").replace(backend.url(), "file:///tmp/t")
        assert said_by(name, text) == said_by(name, "\n".join(picture.story()[name]))


def test_help():
    """The page shows --help as it is. (Python 3.9 has another heading.)"""
    shown = run("--help").stdout.replace("optional arguments:", "options:")
    assert shown == block(".venv/bin/python tooz_join_group.py --help")[1]


def test_every_command_is_run():
    """Each block of commands begins as some string in this file does: a test runs it."""
    here = ast.walk(ast.parse(pathlib.Path(__file__).read_text()))
    strings = [one.value for one in here if isinstance(one, ast.Constant)]
    starts = tuple(one for one in strings if isinstance(one, str) and len(one) > 5)
    for kind, text in BLOCKS:
        if kind in {"sh", "python"} and text != "tests/run\n":  # That runs this.
            start = text.replace(".venv/bin/python tooz_join_group.py client", "client")
            start = start.replace(".venv/bin/python tooz_join_group.py ", "")
            assert start.startswith(starts), text


def test_rows_have_tests():
    """Each row of the table of faults is that of a test."""
    assert not UNTRIED


def test_links():
    """Links resolve."""
    titles = re.findall(r"(?m)^#+ (.*)$", README.lower())
    anchors = {re.sub(r"[^a-z0-9-]", "", one.replace(" ", "-")) for one in titles}
    for link in re.findall(r"\]\((?!https://)([^)]+)\)", README):
        assert link.strip("#") in anchors or (ROOT / link).exists()
