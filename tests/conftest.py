"""Real backends on free ports, and the script as a process, as users run it."""

import concurrent.futures
import contextlib
import fcntl
import io
import os
import pathlib
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import termios
import time
import urllib.parse

import fasteners
import mirakuru
import pexpect.fdpexpect
import port_for
import psutil
import pyte
import pytest

ROOT = pathlib.Path(__file__).parent.parent
SCRIPT = ROOT / "tooz_join_group.py"
README = (ROOT / "README.md").read_text()
# Seconds to wait for what must come. Machines are slow, and no test is about speed.
LIMIT = 60
CLOCK = r"\d\d:\d\d:\d\d"
GROUP = "group1"

# These variables change how a URL is reached.
for name in [*os.environ]:
    if re.fullmatch(r"(?i)(\w+_proxy|\w+_ca_bundle|tooz_backend_url)", name):
        del os.environ[name]

# Each worker of pytest-xdist takes its ports from a range of its own, and each port once.
WORKER = int(re.sub(r"\D", "", os.environ.get("PYTEST_XDIST_WORKER", "")) or 30)
PORTS = iter(range(20000 + 300 * WORKER, 20300 + 300 * WORKER))


def free_port():
    """Return a port that nobody listens on."""
    return next(port for port in PORTS if not port_for.port_is_used(port))


def table(heading):
    """Return the rows of the README's table that begins so, as lists of cells."""
    rows = re.search(rf"(?m)^\| {heading} \|.*\n.*\n((\|.*\n)+)", README)[1]
    return [re.split(r" *\| *", row)[1:-1] for row in rows.splitlines()]


def wait_until(it_is_so):
    """Wait until the function returns something true."""
    limit = time.monotonic() + LIMIT
    while not it_is_so():
        assert time.monotonic() < limit, "it did not come"
        time.sleep(0.02)


def suspend(process):
    """Stop a process and its children; return when it has stopped."""
    os.killpg(process.pid, signal.SIGSTOP)
    status = psutil.Process(process.pid).status
    wait_until(lambda: status() == psutil.STATUS_STOPPED)


def command(*arguments, script=SCRIPT):
    """Return the command line of the script, as a list."""
    return [sys.executable, str(script), *map(str, arguments)]


def broken(folder, line, other):
    """Return a copy of the script with another line, or a part of one, in its place."""
    text = SCRIPT.read_text()
    assert text.count(line) == 1
    copy = folder / SCRIPT.name
    copy.write_text(text.replace(line, other))
    return copy


def run(*arguments, script=SCRIPT):
    """Run the script to its end; return its CompletedProcess, with text in it."""
    options = {"capture_output": True, "text": True, "timeout": LIMIT}
    words = command(*arguments, script=script)
    done = subprocess.run(words, check=False, **options)
    assert "Traceback" not in (done.stderr or "")
    return done


def screen(text, columns=80):
    """Return what a terminal shows after that output, without empty lines."""
    terminal = pyte.Screen(columns, 300)
    pyte.Stream(terminal).feed(text)
    return [line.rstrip() for line in terminal.display if line.strip()]


def afresh():
    """Inherit nothing from whoever started pytest: it may have been nohup, or a script's &."""
    for number in signal.SIGINT, signal.SIGTERM, signal.SIGHUP:
        signal.signal(number, signal.SIG_DFL)
    if os.isatty(0):
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)


class Program(pexpect.fdpexpect.fdspawn):
    """A command in a session of its own: in a pipe, or in a terminal of 80 columns."""

    def __init__(self, *words, terminal=False, columns=80, **options):
        reader, writer = os.openpty() if terminal else os.pipe()
        if terminal:
            size = struct.pack("HHHH", 24, columns, 0, 0)
            fcntl.ioctl(writer, termios.TIOCSWINSZ, size)
        self.process = subprocess.Popen(
            words,
            preexec_fn=afresh,  # noqa: PLW1509 (no other thread holds a lock then)
            stdin=writer if terminal else subprocess.DEVNULL,
            stdout=writer,
            stderr=writer,
            start_new_session=True,
            **options,
        )
        os.close(writer)
        super().__init__(
            reader, encoding="utf-8", codec_errors="replace", timeout=LIMIT
        )
        self.logfile_read = io.StringIO()

    def sees(self, *patterns):
        """Wait until the patterns appear in the output, one after the other."""
        for pattern in patterns:
            which = self.expect([pattern, pexpect.EOF, pexpect.TIMEOUT])
            assert which == 0, f"{pattern!r} did not come:\n{self.transcript}"

    @property
    def transcript(self):
        """All output until now."""
        return self.logfile_read.getvalue()

    def hit(self, number):
        """Send a signal to the program and its children."""
        os.killpg(self.process.pid, number)

    def ends(self, *statuses):
        """Wait for its end; hold it to one of these statuses, and to no traceback."""
        self.expect(pexpect.EOF)
        assert self.process.wait(LIMIT) in statuses, self.transcript
        assert "Traceback" not in self.transcript, self.transcript


@pytest.fixture
def programs():
    """Start programs with programs(word, …); none survives its test."""
    started = []

    def program(*words, **options):
        started.append(Program(*words, **options))
        return started[-1]

    yield program
    sessions, killed = {one.process.pid for one in started}, []
    for process in psutil.process_iter():
        with contextlib.suppress(OSError, psutil.NoSuchProcess):
            if os.getsid(process.pid) in sessions:
                process.kill()
                killed.append(process)
    psutil.wait_procs(killed, LIMIT)  # Then their ports are free.
    for one in started:
        one.process.wait()
        one.close()


@pytest.fixture
def start(programs):
    """Start the script with start(name, url, …)."""

    def client(name, *arguments, under=(), script=SCRIPT, **options):
        words = command(name, GROUP, *arguments, script=script)
        return programs(*under, *words, **options)

    return client


@pytest.fixture
def member(start):
    """Start the script with member(name, url, …), and wait until it is a member."""

    def member(name, *arguments, **options):
        one = start(name, *arguments, **options)
        one.sees("4. members: .*\n")
        return one

    return member


def server(words, where):
    """Return a process: it runs as soon as it answers there, at a URL or at a port."""
    quiet = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
    if isinstance(where, int):
        return mirakuru.TCPExecutor(words, "127.0.0.1", where, timeout=LIMIT, **quiet)
    # etcd refuses HEAD, mirakuru's default.
    return mirakuru.HTTPExecutor(words, where, timeout=LIMIT, method="GET", **quiet)


class Backend:
    """A backend: its URL and, where there are any, its processes, for a test to break."""

    def __init__(self, url, *processes, folder=None):
        self.base, self.processes, self.folder = url, processes, folder
        self.port = urllib.parse.urlsplit(url).port

    def url(self, timeout=None):
        """Return the Tooz URL, with a lease of that many seconds."""
        return f"{self.base}?timeout={timeout}" if timeout else self.base

    def start(self):
        # A node of a cluster runs only once it has met a second one.
        with concurrent.futures.ThreadPoolExecutor() as threads:
            list(threads.map(lambda process: process.start(), self.processes))
        return self

    def kill(self):
        for process in self.processes:
            process.kill()

    def lock(self):
        """Return what no client holds meanwhile: suspended with it, it stops them all."""
        return contextlib.nullcontext()

    def forget(self):
        """Come back empty."""
        self.kill()
        if self.folder:
            shutil.rmtree(self.folder)
        self.start()

    def pause(self):
        for process in self.processes:
            suspend(process.process)

    def resume(self):
        for process in self.processes:
            os.killpg(process.process.pid, signal.SIGCONT)


def addresses(servers):
    """Return where they listen, as etcd's programs want it."""
    return ",".join(f"127.0.0.1:{one.port}" for one in servers)


def etcdctl(etcds, *words):
    """Run etcdctl; return its output."""
    words = ["etcdctl", "--endpoints", addresses(etcds), *words]
    return subprocess.check_output(words, text=True)


class Etcd(Backend):
    """One etcd. In a cluster, `peers` has the names of all members, and their ports."""

    def __init__(self, folder, name="etcd", peers=None):
        client, peers = f"http://127.0.0.1:{free_port()}", peers or {name: free_port()}
        urls = {one: f"http://127.0.0.1:{at}" for one, at in peers.items()}
        words = ["etcd", "--name", name, "--data-dir", str(folder / name)]
        words += ["--listen-client-urls", client, "--advertise-client-urls", client]
        words += ["--listen-peer-urls", urls[name]]
        words += ["--initial-advertise-peer-urls", urls[name]]
        words += ["--initial-cluster", ",".join("=".join(one) for one in urls.items())]
        process = server(words, f"{client}/health")
        super().__init__(f"etcd3+{client}", process, folder=folder / name)

    def delete_members(self):
        for lease in re.findall(
            r"(?m)^[0-9a-f]{8,}$", etcdctl([self], "lease", "list")
        ):
            etcdctl([self], "lease", "revoke", lease)

    def delete_group(self):
        """Delete its key alone: the members' keys stay."""
        assert etcdctl([self], "del", f"tooz/groups/{GROUP}/") == "1\n"


class Memcached(Backend):
    def __init__(self, folder):
        port = free_port()
        words = f"memcached -u nobody -l 127.0.0.1 -p {port}".split()
        super().__init__(f"memcached://127.0.0.1:{port}", server(words, port))

    def tell(self, words, answer):
        with socket.create_connection(("127.0.0.1", self.port)) as connection:
            connection.sendall(f"{words}\r\n".encode())
            assert connection.recv(100) == f"{answer}\r\n".encode()

    def delete_members(self):
        self.tell("flush_all", "OK")

    def delete_group(self):
        self.tell(f"delete _TOOZ_GROUP_{GROUP}", "DELETED")


class Files(Backend):
    def __init__(self, folder):
        super().__init__(f"file://{folder}/tooz", folder=folder / "tooz")

    def lock(self):
        return fasteners.InterProcessLock(self.folder / ".driver_lock")

    def delete_members(self):
        for member in self.folder.glob("groups/*/*.raw"):
            member.unlink()

    def delete_group(self):
        shutil.rmtree(self.folder / "groups")


class Gateway(Backend):
    """A connection that can be cut: etcd's own gateway, which forwards any TCP."""

    def __init__(self, servers):
        port, first = free_port(), servers[0]
        url = first.base.replace(f":{first.port}", f":{port}")
        words = f"etcd gateway start --endpoints {addresses(servers)}"
        words += " --retry-delay 1s --listen-addr"
        health = f"http://127.0.0.1:{port}/health" if "etcd" in url else port
        super().__init__(url, server([*words.split(), f"127.0.0.1:{port}"], health))


class Cluster(Backend):
    """Three etcds behind a gateway, whose address the clients get."""

    def __init__(self, folder):
        peers = {f"node{one}": free_port() for one in range(3)}
        self.nodes = [Etcd(folder, name=name, peers=peers) for name in peers]
        gateway = Gateway(self.nodes)
        every = [process for one in (*self.nodes, gateway) for process in one.processes]
        super().__init__(gateway.base, *every)

    def split(self):
        """Return the nodes as (the leader, the others)."""
        table = etcdctl(self.nodes, "endpoint", "status", "--write-out", "fields")
        ids = re.findall(r'"MemberID" : (\d+)', table)
        nodes = dict(zip(ids, self.nodes))
        leader = nodes.pop(re.search(r'"Leader" : (\d+)', table).group(1))
        return leader, [*nodes.values()]


BACKENDS = {"etcd": Etcd, "memcached": Memcached, "files": Files, "cluster": Cluster}


def on(*names):
    """Run a test on these backends, one after the other."""
    return pytest.mark.parametrize("backend", names, indirect=True)


@pytest.fixture
def backend(request, tmp_path):
    """The backend that on() names: running, and for this test alone."""
    one = BACKENDS[request.param](tmp_path)
    request.addfinalizer(one.kill)
    return one.start()


def pytest_collection_modifyitems(items):
    """End with the tests that wait for all others to end."""
    items.sort(key=lambda item: item.get_closest_marker("alone") is not None)


@pytest.fixture(autouse=True)
def alone(request, tmp_path_factory):
    """Let the tests that take the whole machine run while no other test does."""
    path = tmp_path_factory.getbasetemp().parent / "alone.lock"
    lock = fasteners.InterProcessReaderWriterLock(path)
    marked = request.node.get_closest_marker("alone")
    with lock.write_lock() if marked else lock.read_lock():
        yield
