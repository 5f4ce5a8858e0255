"""The README cannot rot: what it shows is run, and what it says is looked up."""

import ast
import os
import pathlib
import re
import shutil
import socket
import subprocess
import sys
import textwrap

import pexpect
import picture
import pytest
from conftest import LIMIT, README, ROOT, SCRIPT, on, run, table, wait_until
from test_faults import UNPROVEN

BLOCKS = [
    (kind, textwrap.dedent(text))
    for _, kind, text in re.findall(r"(?ms)^( *)```(\w+)\n(.*?)^\1```$", README)
]
# Nobody reads a server's log, and a terminal that is full would stop it.
QUIET = "exec >/dev/null 2>&1\n"
DEFAULT_PORTS = pytest.mark.xdist_group("the default port of etcd")


def block(start, number=0):
    """Return the block that starts so, and what the README shows as its output."""
    found = [at for at, (_, text) in enumerate(BLOCKS) if text.startswith(start)]
    at = found[number]
    kind, output = (*BLOCKS, ("", ""))[at + 1]
    return BLOCKS[at][1], output if kind == "text" else ""


def said_by(name, text):
    """Return the lines of a client, without what changes from run to run."""
    text = re.sub(r"\d\d:\d\d:\d\d", "HH:MM:SS", text.replace("\r", ""))
    text = re.sub(r"(127\.0\.0\.1|localhost)(:\d+)?", "HOST", text)
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
    where = {"cwd": ROOT, "env": {**os.environ, "PATH": path}}

    def shell(*commands):
        words = ["bash", "--noprofile", "--norc"]
        one = programs(*words, terminal=True, columns=200, **where)
        for text in commands:
            text = text.replace("/tmp/", f"{tmp_path}/")
            one.send(text.replace(".venv/bin/python", sys.executable))
        return one

    return shell


def client(name, more=""):
    """Return the README's command that starts a client so, and with these options."""
    return block(f".venv/bin/python tooz_join_group.py {name} group1{more}")[0]


def test_try_it_now(tmp_path, programs):
    """The first lines, in a folder with nothing but what git has."""
    command, output = block("python3 -m venv")
    files = subprocess.check_output(["git", "ls-files", "-z"], cwd=ROOT, text=True)
    for name in files.split("\0")[:-1]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    command = command.replace("/tmp/", f"{tmp_path}/")
    one = programs("bash", "-c", command, cwd=tmp_path)
    one.expect(pexpect.EOF, timeout=4 * LIMIT)
    for name in "clientA", "clientB":
        seen = said_by(name, one.transcript.replace(str(tmp_path), "/tmp"))
        assert seen == said_by(name, output), one.transcript


def test_two_terminals(shell):
    """The same, one command in each, and Ctrl-C. uv needs no environment."""
    a = shell(block("uv run")[0])
    a.expect("4. members: clientA\r\n", timeout=4 * LIMIT)
    a.send("\x03")
    a.sees("5. interrupted", "6. left")
    a = shell(client("clientA", " file:"))
    a.sees("4. members: clientA\r\n")
    b = shell(client("clientB", " file:"))
    b.sees("4. members: clientA, clientB\r\n")
    a.sees("clientB joined")
    b.send("\x03")
    a.sees("clientB gone")


@on("file", "etcd")
def test_bare_lesson(backend, group, programs, tmp_path):
    """It runs as it stands, and does what the script does."""
    text, _ = block("import sys\n")
    assert f"in {sum(map(bool, text.splitlines()))} lines" in README
    (tmp_path / "lesson.py").write_text(text)

    def lesson(name, seconds):
        command, _ = block(".venv/bin/python lesson.py A group1 file:///tmp/tooz 20")
        words = sys.executable, "lesson.py", name, group, backend.url(), seconds
        assert len(words) == len(command.split())
        return programs(*words, cwd=tmp_path)

    a = lesson("A", "60")
    a.sees("members: {b'A'}\n")
    b = lesson("B", "0")
    b.sees("members: {b'(A', b'B|B', b'A)'}\n")
    b.ends(0)
    done = run("C", group, backend.url(), "--wait", "0")
    assert "4. members: A, C\n" in done.stdout
    # The page tells how long the script's own lesson is.
    functions = ast.parse(SCRIPT.read_text()).body
    story = next(
        one for one in functions if getattr(one, "name", "") == "join_and_watch"
    )
    assert f"{story.end_lineno - story.lineno + 1} lines with comments" in README


@DEFAULT_PORTS
def test_etcd(shell):
    """With etcd: look at the keys, then break it."""
    command, _ = block("etcd --data-dir")
    etcd = None if answers(2379) else shell(QUIET, command)
    wait_until(lambda: answers(2379))
    a = shell(client("clientA", " --wait 600"))
    a.sees("4. members: clientA\r\n", "lease .#")
    command, output = block("etcdctl get")
    assert subprocess.check_output(["bash", "-c", command], text=True) == output
    a.send("\x03")
    a.sees("6. left")

    a = shell(client("clientA", " 'etcd3"))
    a.sees("4. members: clientA\r\n")
    export, _ = block("export TOOZ_BACKEND_URL='etcd3+http://127")
    experiments = [text for _, text in BLOCKS if "sleep 3; " in text]
    b = shell(export, experiments[0])
    a.sees(*["clientB joined", "clientB gone"] * 2)
    b.send(experiments[1].replace(".venv/bin/python", sys.executable))
    a.sees(*["clientC joined", "clientC gone"] * 2)
    b.sees("clientC: 3. joined again", "clientC: 6. left")

    gateway = shell(QUIET, block("etcd gateway start --endpoints")[0])
    wait_until(lambda: answers(23790))
    b = shell(client("clientB", " 'etcd3+http://127.0.0.1:23790"))
    a.sees("clientB joined")
    b.sees("lease .#")
    gateway.send("\x1a")
    a.sees("clientB gone")
    b.sees("trouble with the backend: no answer", "is over")
    gateway.send("fg\n")
    b.sees("3. joined again")
    a.sees("clientB joined")
    b.send("\x03")
    a.sees("clientB gone")

    if etcd:
        etcd.send("\x03")
        a.sees("trouble with the backend")
        etcd.send("!etcd\n")  # bash: once more.
        wait_until(lambda: answers(2379))
        shell(export, client("clientB", " &"))
        a.sees("clientB joined, members: clientA, clientB")
        assert "3. joined again" not in a.transcript
    a.send("\x03")
    a.sees("6. left")


@DEFAULT_PORTS
def test_memcached(shell):
    """With memcached: look at the keys, then restart it."""
    command, _ = block("memcached -u memcache\n")
    memcached = None if answers(11211) else shell(QUIET, command)
    wait_until(lambda: answers(11211))
    a = shell(client("clientA", " memcached:"))
    a.sees("4. members: clientA\r\n")
    command, output = block(".venv/bin/python -c")
    look = ["bash", "-c", command.replace(".venv/bin/python", sys.executable)]
    # Older versions of Tooz store no capabilities as b"", newer ones as None.
    shown = subprocess.check_output(look, text=True).replace(r"\xc4\x00", r"\xc0")
    assert shown == output
    a.send("\x03")
    a.sees("6. left")
    a = shell(client("clientA", " 'memcached"))
    a.sees("4. members: clientA\r\n")
    if memcached:
        memcached.send("\x03")
        a.sees("trouble with the backend")
        memcached.send(f"{block('memcached -u memcache')[0]}")
        a.sees("3. joined again\r\n", "4. members: clientA\r\n")
    a.send("\x03")
    a.sees("6. left")


def test_cluster(shell):
    """The commands of the cluster; the leader ends."""
    nodes = [shell(QUIET, block(f"etcd --name n{one}")[0]) for one in (1, 2, 3)]
    for port in 12379, 22379, 32379:
        wait_until(lambda port=port: answers(port))
    shell(QUIET, block("etcd gateway start --listen-addr")[0])
    wait_until(lambda: answers(23791))
    a = shell(client("clientA", " 'etcd3+http://127.0.0.1:23791"))
    a.sees("4. members: clientA\r\n")
    # The page has a table, which each etcdctl draws in its own way.
    status = block("etcdctl --endpoints")[0].replace("out table", "out fields")
    fields = subprocess.check_output(["bash", "-c", status], text=True)
    ids = re.findall(r'"MemberID" : (\d+)', fields)
    leader = ids.index(re.search(r'"Leader" : (\d+)', fields).group(1))
    nodes[leader].send("\x03")
    b = shell(client("clientB", " 'etcd3+http://127.0.0.1:23791"))
    b.sees("4. members: clientA, clientB\r\n")
    a.sees("clientB joined, members: clientA, clientB\r\n")
    assert "gone" not in a.transcript


@on("etcd", own=True)
def test_side_by_side(backend, start, group):
    """The scene is played; the text and the picture show just its lines."""
    block("export TOOZ_BACKEND_URL='etcd3+http://localhost?timeout=5'")
    text, _ = block("A: 1. started")
    url = backend.url(timeout=5)
    played = picture.play(lambda name, *options: start(name, url, *options))
    played[0].ends(0)
    played[1].ends(130)
    for name, one in zip("ABC", played):
        seen = said_by(name, one.transcript.replace(group, "g1"))
        assert seen == said_by(name, text)
        assert seen == said_by(name, "\n".join(picture.story()[name]))


def test_help(monkeypatch):
    """The README shows --help as it is; a default URL that is odd does not matter."""
    monkeypatch.setenv("TOOZ_BACKEND_URL", "redis://:s3cr3t@localhost/50%25")
    monkeypatch.setenv("COLUMNS", "80")
    _, output = block(".venv/bin/python tooz_join_group.py --help")
    done = run("--help")
    assert (
        done.stdout.replace("optional arguments:", "options:") == output
    )  # Python 3.9
    assert done.returncode == 0


def test_every_command_is_run():
    """Each block of commands begins as some string in this file does: a test runs it."""
    here = ast.walk(ast.parse(pathlib.Path(__file__).read_text()))
    strings = [one.value for one in here if isinstance(one, ast.Constant)]
    starts = [one for one in strings if isinstance(one, str) and len(one) > 5]
    for kind, text in BLOCKS:
        if (
            kind in {"sh", "python"} and text != "tests/run\n"
        ):  # That is what runs this.
            text = re.sub(r"^\S+ tooz_join_group.py client. group1", "", text)
            assert any(text.startswith(one) for one in starts) or "sleep 3; " in text


def test_rows_have_tests():
    """Each row of the tables of faults is that of a test."""
    assert not UNPROVEN


def messages():
    """Return what the script can print as trouble: regular expressions."""
    where = r'(?:(?:warn|rror|exit)\(|write\(2, |return (?=f"We))f?b?'
    for text in re.findall(rf'{where}"(.*)"', SCRIPT.read_text()):
        first = text.split("\\n")[0]
        yield re.sub(r"\\\{.*?\\\}", ".+", re.escape(first))


def test_troubleshooting():
    """Each message of the script is in the README, and the other way round."""
    cells = [row[0] for row in table("message")]
    shown = [one for cell in cells for one in re.findall(r"`([^`]+)`", cell)]
    assert len([*messages()]) >= 12
    for pattern in messages():
        assert any(re.search(pattern, one) for one in shown), pattern
    for one in shown:
        assert any(re.search(pattern, one) for pattern in messages()), one


def test_links():
    """Links resolve. Each part that is folded has its heading right above the fold."""
    headings = re.findall(r"(?m)^#+ (.*)$", README)
    plain = [re.sub(r"[^a-z0-9 -]", "", one.lower()) for one in headings]
    for link in re.findall(r"\]\(([^)]+)\)", README):
        if link.startswith("#"):
            assert link[1:].replace("-", " ") in [
                one.replace("-", " ") for one in plain
            ]
        elif not link.startswith("https://"):
            assert (ROOT / link).exists()
    assert len(re.findall(r"(?m)^## .*\n\n<details>", README)) == README.count(
        "<details>"
    )
