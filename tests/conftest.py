"""Real backends on free ports, and the script as a process, as users run it."""

import contextlib
import io
import os
import pathlib
import re
import signal
import subprocess
import sys
import time
import urllib.parse

import fasteners
import mirakuru
import pexpect
import port_for
import psutil
import pytest

ROOT = pathlib.Path(__file__).parent.parent
SCRIPT = ROOT / "tooz_join_group.py"
README = (ROOT / "README.md").read_text()
LIMIT = 60  # Seconds to wait for what must come: machines are slow.
CLOCK = r"\d\d:\d\d:\d\d"
GROUP = "group1"

# These variables change how a URL is reached. (The script reads one when imported.)
for name in [*os.environ]:
    if re.fullmatch(r"(?i)(\w+_proxy|\w+_ca_bundle|tooz_backend_url)", name):
        del os.environ[name]
sys.path.insert(0, str(ROOT))

# Each worker of pytest-xdist takes its ports from a range of its own, and each port once.
WORKER = int(re.sub(r"\D", "", os.environ.get("PYTEST_XDIST_WORKER", "")) or 30)
PORTS = iter(range(20000 + 300 * WORKER, 20300 + 300 * WORKER))


def free_port():
    """Return a port that nobody listens on."""
    return next(port for port in PORTS if not port_for.port_is_used(port))


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


def run(*arguments):
    """Run the script to its end; return its CompletedProcess, with text in it."""
    options = {"capture_output": True, "text": True, "timeout": 2 * LIMIT}
    done = subprocess.run(command(*arguments), check=False, **options)
    assert "Traceback" not in done.stderr
    return done


def afresh():
    """Ignore no signals, even if whoever started pytest did: nohup, or a script's &."""
    for number in signal.SIGINT, signal.SIGTERM, signal.SIGHUP:
        signal.signal(number, signal.SIG_DFL)


class Program(pexpect.spawn):
    """A command in a session of its own, in a terminal that can do nothing, or all."""

    def __init__(self, *words, terminal=False, env=os.environ, **options):
        env = {**env, "TERM": "xterm" if terminal else "dumb"}
        options |= {"env": env, "encoding": "utf-8", "codec_errors": "replace"}
        super().__init__(words[0], [*words[1:]], LIMIT, preexec_fn=afresh, **options)
        self.logfile_read = io.StringIO()

    def sees(self, *patterns):
        """Wait until the patterns appear in the output, one after the other."""
        for pattern in patterns:
            wanted = pattern.replace("\n", "\r\n")
            which = self.expect([wanted, pexpect.EOF, pexpect.TIMEOUT])
            assert which == 0, f"{pattern!r} did not come:\n{self.transcript}"

    @property
    def transcript(self):
        """All output until now."""
        return self.logfile_read.getvalue().replace("\r\n", "\n")

    def hit(self, number):
        """Send a signal to the program and its children."""
        os.killpg(self.pid, number)

    def ends(self, *statuses, traceback=False):
        """Wait for its end, with one of these statuses; -n is signal n."""
        self.expect(pexpect.EOF)
        wait_until(lambda: not self.isalive())
        status = -self.signalstatus if self.signalstatus else self.exitstatus
        assert status in statuses, self.transcript
        assert ("Traceback" in self.transcript) is traceback, self.transcript


@pytest.fixture
def programs():
    """Start programs with programs(word, …); none survives its test."""
    started = []

    def program(*words, kind=Program, **options):
        started.append(kind(*words, **options))
        return started[-1]

    yield program
    sessions = {one.pid for one in started}
    for process in psutil.process_iter():
        with contextlib.suppress(OSError, psutil.NoSuchProcess):
            if os.getsid(process.pid) in sessions:
                process.kill()
    for one in started:
        one.close()


@pytest.fixture
def start(programs):
    """Start the script with start(name, url, …), and wait for a pattern, if not None."""

    def client(name, *arguments, until=None, under=(), script=SCRIPT, **options):
        words = command(name, GROUP, *arguments, script=script)
        one = programs(*under, *words, **options)
        one.sees(*[until] if until else [])
        return one

    return client


class Backend:
    """A backend for a test to break: its URL and, except with files, its server."""

    def __init__(self, url, command=None, folder=None):
        self.base, self.folder = url, folder
        self.port = urllib.parse.urlsplit(url).port
        quiet = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
        options = {"host": "127.0.0.1", "port": self.port, "timeout": LIMIT, **quiet}
        self.server = mirakuru.TCPExecutor(command, **options) if command else None

    def url(self, timeout=None):
        """Return the Tooz URL, with a lease of that many seconds."""
        return f"{self.base}?timeout={timeout}" if timeout else self.base

    def start(self):
        if self.server:
            self.server.start()
        return self

    def kill(self):
        if self.server:
            self.server.kill()

    def lock(self):
        """Return a lock of the clients: one that is suspended with it stops the others."""
        if self.server:
            return contextlib.nullcontext()
        return fasteners.InterProcessLock(self.folder / ".driver_lock")

    def gateway(self):
        """Return this backend as it is reached through a gateway: a connection to cut."""
        port = free_port()
        ends = f"--listen-addr 127.0.0.1:{port} --endpoints 127.0.0.1:{self.port}"
        url = self.base.replace(str(self.port), str(port))
        return Backend(url, f"etcd gateway start {ends}")

    def pause(self):
        suspend(self.server.process)

    def resume(self):
        os.killpg(self.server.process.pid, signal.SIGCONT)


def etcd(folder):
    url, peer = (f"http://127.0.0.1:{free_port()}" for _ in range(2))
    command = (
        f"etcd --data-dir {folder}/etcd --initial-cluster default={peer}"
        f" --listen-client-urls {url} --advertise-client-urls {url}"
        f" --listen-peer-urls {peer} --initial-advertise-peer-urls {peer}"
    )
    return Backend(f"etcd3+{url}", command, folder / "etcd")


def memcached(_):
    port = free_port()
    command = f"memcached -u nobody -l 127.0.0.1 -p {port}"
    return Backend(f"memcached://127.0.0.1:{port}", command)


def files(folder):
    return Backend(f"file://{folder}/tooz", folder=folder / "tooz")


BACKENDS = {"etcd": etcd, "memcached": memcached, "files": files}


def on(*names):
    """Run a test on these backends, one after the other."""
    return pytest.mark.parametrize("backend", names, indirect=True)


@pytest.fixture
def backend(request, tmp_path):
    """The backend that on() names: running, and for this test alone."""
    one = BACKENDS[request.param](tmp_path)
    request.addfinalizer(one.kill)
    return one.start()
