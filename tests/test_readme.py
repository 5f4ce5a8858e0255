"""The README cannot rot: what it shows is run, and what it says is looked up."""

import ast
import os
import pathlib
import re
import signal
import subprocess
import sys

import pexpect
import pytest
from conftest import (
    LIMIT,
    ROOT,
    SCRIPT,
    Terminal,
    Watched,
    own,
    run,
    start_afresh,
    wait_until,
)
from pexpect.popen_spawn import PopenSpawn
from test_faults import ROWS

README = (ROOT / "README.md").read_text()
LINES = SCRIPT.read_text().splitlines()
# What a reader's shell has, with the commands of our own virtual environment.
PATH = f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"
ENVIRONMENT = {**os.environ, "PATH": PATH}
BLOCKS = re.findall(r"(?ms)^( *)```(\w+)\n(.*?)^\1```$", README)


def block(start, number=0):
    """Return the command that starts so, and what the README shows as its output."""
    found = [at for at, one in enumerate(BLOCKS) if one[2].lstrip().startswith(start)]
    at = found[number]
    _, _, command = BLOCKS[at]
    _, kind, output = BLOCKS[at + 1] if at + 1 < len(BLOCKS) else ("", "", "")
    return command.strip(), output if kind == "text" else ""


def rows(heading):
    """Return the cells of the table that has such a first heading, row by row."""
    table = re.search(
        rf"(?m)^\| {re.escape(heading)} \|.*\n\|[- |]+\n((?:\|.*\n)+)", README
    )
    return [
        [cell.strip().replace(r"\|", "|") for cell in re.split(r"(?<!\\)\|", row)[1:-1]]
        for row in table.group(1).splitlines()
    ]


def masked(text, folder="/tmp"):
    """Return the text without what changes from run to run."""
    text = text.replace("\r\n", "\n").replace(str(folder), "/tmp")
    return re.sub(r"\d\d:\d\d:\d\d", "HH:MM:SS", text)


class Shell(Watched, PopenSpawn):
    """A command line of the README, in a process group of its own."""

    def __init__(self, text, folder, **environment):
        super().__init__(
            ["bash", "-c", text.replace("/tmp/", f"{folder}/")],
            encoding="utf-8",
            cwd=ROOT,
            env={**ENVIRONMENT, **environment},
            preexec_fn=start_afresh,
        )
        self.begin()
        self.folder = folder

    def shows(self, output):
        """Wait for just these lines, whatever the time of day."""
        for line in masked(output).splitlines():
            pattern = re.escape(line).replace("HH:MM:SS", r"\d\d:\d\d:\d\d")
            pattern = pattern.replace("/tmp", re.escape(str(self.folder)))
            self.sees(rf"(?m)^{pattern}\r?$")


@pytest.fixture
def shell(tmp_path):
    """Start command lines of the README; /tmp is a folder of the test's own."""
    shells = []

    def shell(text, **environment):
        shells.append(Shell(text, tmp_path, **environment))
        return shells[-1]

    yield shell
    for one in reversed(shells):
        try:
            os.killpg(one.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        one.proc.wait()


def answers(*command):
    """Tell whether a command succeeds."""
    environment = {**os.environ, "ETCDCTL_API": "3"}
    return (
        subprocess.run(
            command, check=False, env=environment, capture_output=True
        ).returncode
        == 0
    )


def start_etcd(shell):
    """Type the README's command, unless an etcd runs here already."""
    if not answers("etcdctl", "endpoint", "health"):
        shell(block("etcd --data-dir")[0])
        wait_until(lambda: answers("etcdctl", "endpoint", "health"))
    subprocess.run(
        ["etcdctl", "del", "--prefix", "tooz/groups/group1/"],
        check=True,
        env={**os.environ, "ETCDCTL_API": "3"},
        capture_output=True,
    )


# --- What the README shows, is run ---


def test_try_it_now(tmp_path, shell):
    """The first line, in a folder with nothing but what git has."""
    command, output = block("python3 -m venv")
    files = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True
    )
    clone = tmp_path / "clone"
    for name in files.stdout.split():
        (clone / name).parent.mkdir(parents=True, exist_ok=True)
        (clone / name).write_bytes((ROOT / name).read_bytes())
    one = shell(f"cd '{clone}'; {command}")
    one.expect(pexpect.EOF, timeout=4 * LIMIT)
    # Two processes write: only the order of each one's own lines is sure. pip may say
    # something about itself, too.
    lines = masked(one.transcript, tmp_path).splitlines()
    for client in "clientA: ", "clientB: ":
        assert [line for line in lines if line.startswith(client)] == [
            line for line in masked(output).splitlines() if line.startswith(client)
        ], one.transcript


def test_uv(tmp_path, start):
    """The same with uv, in a terminal: it reads the script's own list of packages."""
    command, _ = block("uv run")
    words = command.replace("/tmp/", f"{tmp_path}/").split()
    one = start(*words, kind=Terminal, cwd=ROOT, env=ENVIRONMENT)
    one.expect("4. members: clientA\r\n", timeout=4 * LIMIT)
    one.sendintr()
    one.sees("6. left group1 and stopped")
    one.ends(130)


def test_etcd(shell, default_etcd_port):
    """Run with etcd; look at the keys; break it yourself."""
    start_etcd(shell)
    command, output = block("python tooz_join_group.py clientA group1\n")
    *before, last = output.splitlines()
    a = shell(command)
    a.shows("\n".join(before))
    command, output = block("ETCDCTL_API=3 etcdctl get")
    assert subprocess.check_output(["bash", "-c", command], text=True) == output
    command, output = block("python tooz_join_group.py clientB group1 etcd3+http")
    b = shell(f"exec {command}")
    b.shows(output)
    a.shows(last)
    b.hit(signal.SIGINT)
    a.sees("clientB gone")

    # The experiments; A has the short lease of the README now.
    os.killpg(a.pid, signal.SIGINT)
    a.sees("6. left")
    export, _ = block("export TOOZ_BACKEND_URL=")
    url = export.split("'")[1]
    a = shell(
        block("python tooz_join_group.py clientA group1 --wait 600")[0],
        TOOZ_BACKEND_URL=url,
    )
    a.sees("4. members: clientA\n")
    crash, _ = block("python tooz_join_group.py clientB group1 --wait 600 &")
    shell(crash, TOOZ_BACKEND_URL=url)
    a.sees("clientB joined", "clientB gone")
    suspend, _ = block("python tooz_join_group.py clientC group1 --wait 15 &")
    b = shell(suspend, TOOZ_BACKEND_URL=url)
    a.sees("clientC joined", "clientC gone", "clientC joined", "clientC gone")
    b.sees("Joining again", "6. left")
    twice, _ = block("python tooz_join_group.py clientA group1\n", 1)
    b = shell(twice, TOOZ_BACKEND_URL=url)
    b.sees("looking for up to 7 s", "its owner is alive")
    b.expect(pexpect.EOF)
    assert "clientA gone" not in a.transcript
    os.killpg(a.pid, signal.SIGINT)
    a.sees("6. left")


def test_memcached(shell):
    """Run with memcached; look at the keys; restart it."""
    look = [
        sys.executable,
        "-c",
        "from pymemcache import Client; Client('localhost').stats()",
    ]
    server = None
    if not answers(*look):
        command, _ = block("memcached -u memcache\n")
        server = shell(f"exec {command}")
        wait_until(lambda: answers(*look))
    subprocess.run(
        [
            sys.executable,
            "-c",
            "from pymemcache import Client; Client('localhost').delete('_TOOZ_GROUP_group1')",
        ],
        check=True,
    )
    command, output = block("python tooz_join_group.py clientA group1 memcached")
    *before, last = output.splitlines()
    a = shell(f"exec {command}")
    a.shows("\n".join(before))
    command, output = block("python -c")
    looked = shell(command)
    looked.expect(pexpect.EOF)
    # Older versions of Tooz store no capabilities as b"", newer ones as None.
    assert masked(looked.transcript).replace(r"\xc4\x00", r"\xc0") == output
    command, output = block("TOOZ_BACKEND_URL=memcached://localhost python")
    b = shell(command)
    b.shows(output)
    a.shows(last)
    os.killpg(b.pid, signal.SIGINT)
    a.sees("clientB gone")
    a.hit(signal.SIGINT)
    a.sees("6. left")
    if server:
        command, _ = block("python tooz_join_group.py clientA group1 'memcached")
        a = shell(command)
        a.sees("4. members: clientA\n")
        server.hit(signal.SIGINT)
        a.sees("; trying for another")
        shell(block("memcached -u memcache\n")[0])
        a.sees(
            "answers again",
            "Joining again",
            "2. created group1",
            "4. members: clientA\n",
        )


def test_cluster(shell):
    """The five commands of the cluster; kill the leader."""
    nodes = [
        shell(f"exec {block(f'etcd --name n{number}')[0]}") for number in (1, 2, 3)
    ]
    status, _ = block("ETCDCTL_API=3 etcdctl --endpoints")
    endpoints = status.split()[3].split(",")
    for endpoint in endpoints:
        wait_until(
            lambda endpoint=endpoint: answers(
                "etcdctl", "--endpoints", endpoint, "endpoint", "health"
            )
        )
    shell(block("etcd gateway start")[0])
    wait_until(
        lambda: answers(
            "etcdctl", "--endpoints", "127.0.0.1:23790", "endpoint", "health"
        )
    )
    url = "'etcd3+http://127"
    command, _ = block(f"python tooz_join_group.py clientA group1 {url}")
    a = shell(command)
    a.sees("4. members: clientA\n")
    table = subprocess.check_output(["bash", "-c", status], text=True)
    head, *lines = [line for line in table.splitlines() if line.startswith("|")]
    column = [cell.strip() for cell in head.split("|")].index("IS LEADER")
    leaders = [line.split("|")[column].strip() for line in lines]
    assert sorted(leaders) == ["false", "false", "true"]
    leader = leaders.index("true")
    nodes[leader].hit(signal.SIGINT)
    del endpoints[leader]
    for endpoint in endpoints:
        wait_until(
            lambda endpoint=endpoint: answers(
                "etcdctl", "--endpoints", endpoint, "endpoint", "health"
            )
        )
    b = shell(block(f"python tooz_join_group.py clientB group1 {url}")[0])
    b.sees("4. members: clientA, clientB\n")
    a.sees("clientB joined, members: clientA, clientB\n")
    assert "gone" not in a.transcript


@own("etcd")
def test_side_by_side(own_backend, start):
    """Each column is a client's stdout, line by line."""
    text = next(text for _, _, text in BLOCKS if text.startswith("clientA   "))
    cells = [line.split("|") for line in text.splitlines()[2:]]
    shown = [
        "".join(row[at].strip() + " " for row in cells if len(row) > at)
        for at in range(3)
    ]
    url = own_backend.url(timeout=5)
    stdout = {"under": ["bash", "-c", 'exec "$@" 2>/dev/null', "-"]}
    a = start("clientA", "group1", url, "--wait", "20", **stdout)
    a.sees("4. members")
    b = start("clientB", "group1", url, **stdout)
    a.sees("clientB joined")
    c = start("clientC", "group1", url, **stdout)
    c.sees("4. members: .*\n")
    b.sees("clientC joined, members: .*\n")
    c.hit(signal.SIGKILL)
    a.sees("clientC gone")
    b.sees("clientC gone, members: .*\n")
    b.hit(signal.SIGINT)
    b.ends(130)
    a.ends(0)

    def squeezed(text):
        text = text.replace(f"127.0.0.1:{own_backend.port}", "localhost")
        text = masked(text).replace("HH:MM:SS (kill -9)", "").replace("^C", "")
        return "".join(text.split())

    for client, column in zip((a, b, c), shown):
        assert squeezed(client.transcript) == squeezed(column)


def test_help_block():
    """The README shows --help as it is."""
    _, output = block("python tooz_join_group.py --help")
    done = run("--help", env={**os.environ, "COLUMNS": "80"})
    assert (
        done.stdout.replace("optional arguments:", "options:") == output
    )  # Python 3.9


# --- What the README says, is looked up ---


def test_every_command_is_run():
    """Each shell block begins as some string in this file does: a test runs it."""
    here = ast.walk(ast.parse(pathlib.Path(__file__).read_text()))
    strings = [one.value for one in here if isinstance(one, ast.Constant)]
    starts = [one for one in strings if isinstance(one, str) and len(one) > 5]
    for _, kind, text in BLOCKS:
        if kind == "sh" and text != "tests/run\n":  # That is what runs this.
            assert any(text.lstrip().startswith(one) for one in starts), text


def test_rows_have_tests():
    """Each cell of the table of faults is proven by a test, or says why it is empty."""
    columns = ["etcd", "cluster", "memcached", "file"]
    table = {
        row: {name for name, cell in zip(columns, cells) if not cell.startswith("—")}
        for row, *cells in rows("what happens")
    }
    assert table == ROWS


def test_line_references():
    """Each step's line has that step's call."""
    steps = rows("step")
    assert len(steps) == 6
    for _, calls, _, where in steps:
        shown, linked = map(int, re.findall(r"line (\d+).*#L(\d+)", where)[0])
        assert shown == linked
        call = re.search(r"`(\w+)", calls).group(1)
        line = LINES[linked - 1]
        assert call in line or "watch(we" in line, (calls, line)


def messages():
    """Return what the script can print as trouble: regular expressions."""
    found = []
    for node in ast.walk(ast.parse(SCRIPT.read_text())):
        if not isinstance(node, ast.Call):
            continue
        name = getattr(node.func, "id", getattr(node.func, "attr", ""))
        if name not in {
            "warn",
            "trouble",
            "ValueError",
            "ArgumentTypeError",
            "error",
            "exit",
        }:
            continue
        text = node.args[-1]
        parts = text.values if isinstance(text, ast.JoinedStr) else [text]
        pattern = "".join(
            re.escape(str(part.value)) if isinstance(part, ast.Constant) else ".+"
            for part in parts
        ).split(re.escape("\n"))[0]
        if re.search(r"\w{3}", pattern):
            found.append(pattern)
    return found


def test_troubleshooting():
    """Each message of the script is in the README, and the other way round."""
    shown = [one for row in rows("message") for one in re.findall(r"`([^`]+)`", row[0])]
    assert len(messages()) >= 15
    for pattern in messages():
        assert any(re.search(pattern, one) for one in shown), pattern
    for one in shown:
        assert any(re.search(pattern, one) for pattern in messages()), one


def test_links():
    """Links inside the page and to files resolve."""
    headings = re.findall(r"(?m)^#+ (.*)$", README)
    anchors = {
        re.sub(r"[^a-z0-9 -]", "", one.lower()).replace(" ", "-") for one in headings
    }
    links = re.findall(r"\]\(([^)]+)\)", README)
    assert links
    for link in links:
        if link.startswith("#"):
            assert link[1:] in anchors
        elif not link.startswith("https://"):
            assert (ROOT / link.split("#")[0]).exists()
