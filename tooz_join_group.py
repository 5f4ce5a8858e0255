#!/usr/bin/env python3
# /// script
# requires-python = ">=3.9"
# dependencies = ["tooz>=7.0.0", "etcd3gw>=2.3.0", "pymemcache>=4.0.0"]
# ///
"""How do my nodes know who is alive? They join a group, with Tooz.

Run it in two or three terminals at once, each under a name of its own:

    python tooz_join_group.py clientA group1
    python tooz_join_group.py clientB group1

The lesson is the first function, join_and_watch():

    1. create a coordinator and start its heartbeat
    2. create the group, or find it there
    3. join it
    4. print its members
    5. wait, and show who comes and goes
    6. leave it and stop

After it comes trouble: what a lesson leaves out, and a service must not. Last come
words: what goes in, what comes out. The lesson, "Creating, Joining and Leaving Groups":
https://www.educative.io/courses/hackers-guide-scaling-python/creating-joining-and-leaving-groups
"""

import argparse
import contextlib
import errno
import logging
import math
import os
import re
import shutil
import signal
import sys
import threading
import time
import traceback
import urllib.parse
import warnings

# Before step 2 there is nothing to clean up: let Ctrl-C just end us.
if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
try:
    from tooz import coordination
except ImportError as missing:
    sys.exit(f"{missing}. Install what is needed: pip install -r requirements.txt")

LOOK_EVERY = 0.27  # Seconds between two looks: a change shows within 0.3 s.
UNEASY_AFTER = 2  # Seconds without an answer before we say that we are waiting.


def join_and_watch(we):
    """Take the six steps. `we` has our options, to which main() adds our state.

    Raises SystemExit with the exit status, if something ends the steps early.
    """
    me, group = we.client.encode(), we.group.encode()  # Tooz takes names as bytes.
    wait_until_our_name_is_free(we)

    # 1. The coordinator is our line to the backend. Its heart is a thread that beats
    #    twice in each lease. Without it, we would be forgotten when the first one ends.
    with patience(we):
        coordinator = coordination.get_coordinator(we.url, me)
        coordinator.start(start_heart=True)
        lease = coordinator.heartbeat()  # By hand, as it returns the lease (s).
        say(we, f"1. started a coordinator on {we.backend}")
        say(we, promises(coordinator, lease))

    over, members = False, set()
    with until_it_is_time_to_go(we):
        while not over:
            with patience(we):
                # 2. Whoever comes first creates the group. The call returns a future at
                #    once; get() waits for its result, or raises what went wrong.
                try:
                    coordinator.create_group(group).get()
                    say(we, f"2. created {we.group}")
                except coordination.GroupAlreadyExist:
                    say(we, f"2. found {we.group}")

                # 3. The backend lists us from here on, for as long as our heart beats.
                coordinator.heartbeat()  # On etcd: a new lease, if the old one ran out.
                try:
                    coordinator.join_group(group).get()
                    say(we, f"3. joined {we.group}")
                except coordination.MemberAlreadyExist:
                    sort_out_our_name(we, coordinator)
                we.joined = True

                # 4. The list is kept by the backend: all members see the same one.
                members = coordinator.get_members(group).get()
                say(we, f"4. {listing(members)}")

            # 5. Nobody calls us when a member comes or goes: we look, again and again.
            #    If we find that we were thrown out, the story starts over at step 2.
            over = watch(we, coordinator, members, lease)
        say(we, f"5. waited {we.wait:g} s")

    # 6. We say that we leave, and the others see it at once. If we just stopped
    #    beating, they would go on seeing us until our lease ends.
    with patience(we):
        try:
            coordinator.leave_group(group).get()
        except (coordination.MemberNotJoined, coordination.GroupNotCreated):
            pass  # We were thrown out before. That is no error, as we wanted to go.
        coordinator.stop()  # The heart stops, and the line to the backend is closed.
    say(we, f"6. left {we.group} and stopped")


# --- Trouble ---


class Late(BaseException):
    """An answer took too long. Some drivers swallow Exception: this gets through."""


@contextlib.contextmanager
def patience(we):
    """Put an end to waiting: the requests in this block get the URL's timeout (s).

    Silence and errors are told once, and so is the first answer after them. They end
    the program (exit 1) before we have joined and while we leave; else only the block.
    """
    we.asked, leaving = time.monotonic(), we.leaving
    seconds = min(we.timeout, max(UNEASY_AFTER, we.deadline - we.asked))
    limit = we.asked + seconds
    late = Late(f"no answer within {seconds:.0f} s")

    def trouble(words):
        if not we.in_trouble:
            end = limit if we.deadline == math.inf else max(limit, we.deadline)
            left = end - time.monotonic()
            warn(we, f"{we.backend}: {words}; trying for another {left:.0f} s")
        we.in_trouble = True

    def ring(*_):
        left = limit - time.monotonic()
        if left > 0:
            signal.setitimer(signal.ITIMER_REAL, left)
            trouble("no answer")
        elif we.leaving == leaving:  # Else a signal has just ended this block: let it.
            raise late

    signal.signal(signal.SIGALRM, ring)
    # While a name server is silent, Python hears no signal. So where we cannot go on
    # without an answer, threads do the same, a little later.
    timers = []
    if leaving or not we.joined:
        timers.append(threading.Timer(UNEASY_AFTER + 0.5, trouble, ["no answer"]))
        timers.append(threading.Timer(seconds + 0.5, give_up, [we, late]))
    try:
        try:
            signal.setitimer(signal.ITIMER_REAL, min(UNEASY_AFTER, seconds))
            for timer in timers:
                timer.start()
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            for timer in timers:
                timer.cancel()
        if we.in_trouble:
            warn(we, f"{we.backend} answers again")
        we.in_trouble = False
    except (Exception, Late) as error:  # noqa: BLE001 (drivers raise what they like)
        if leaving or not we.joined:
            give_up(we, error)
        trouble(reason(error))


def look(we, coordinator):
    """Return the members' names, a set of bytes; None if the backend did not answer."""
    with patience(we):
        try:
            return coordinator.get_members(we.group.encode()).get()
        except coordination.GroupNotCreated:
            return set()  # A group that is not there has no members.


def wait_until_our_name_is_free(we):
    """Return when no member has our name; exit (status 1) if one alive has it.

    A name in the list belongs to somebody alive, or to somebody who crashed and whose
    lease still runs. Nobody can tell which, except by waiting for one lease to end.
    """
    # We look under a name that no client can have. On memcached, a beat under our own
    # would keep a dead namesake in the list, and stop() would throw a living one out.
    # "sync" spares us a thread: here, the call itself does the work behind the future.
    with patience(we):
        other = f"{we.client}?".encode()
        scout = coordination.get_coordinator(we.url, other, executor="sync")
        scout.start()
        lease = scout.heartbeat()
        if lease is not None and lease < 1:
            raise ValueError("a lease must be 1 s or longer")
    # None: a driver without heartbeats. And backends are a little late in forgetting.
    enough, limit = (lease or we.timeout) + 2, None
    while we.client.encode() in look(we, scout):
        if limit is None:
            limit = time.monotonic() + enough
            warn(we, f"the name {we.client} is taken: its owner is alive, or crashed")
            warn(we, f"looking for up to {enough:g} s to see which")
        left = limit - time.monotonic()
        if left < 0:
            warn(we, "its owner is alive (or has a longer lease). Take another name")
            sys.exit(1)
        status(we, f"{left:.0f} s left to look at the name {we.client}")
        time.sleep(LOOK_EVERY)
    with patience(we):
        scout.stop()


def sort_out_our_name(we, coordinator):
    """Our name was free, and yet we cannot join under it: find out whose it is."""
    group = we.group.encode()
    if we.client.encode() not in coordinator.get_members(group).get():
        # A crashed client on the file driver, which hides its file when the lease
        # ends, and still refuses its name. Leaving under that name removes the file.
        coordinator.leave_group(group).get()
        coordinator.join_group(group).get()
        say(we, f"3. joined {we.group}, after removing what a crash had left")
    elif we.joined:
        say(we, f"3. still in {we.group}")
    else:
        # A namesake joined in the instant since we looked. We go without leave_group()
        # and stop(): both would hit the namesake.
        warn(we, f"the name {we.client} was taken just now. Take another name")
        os._exit(1)


def watch(we, coordinator, members, lease):
    """Show who comes and goes. Return True when the wait is over, False if we are out.

    `members` are those we have shown, a set of bytes; `lease` is in seconds, or None.
    """
    we.deadline = min(we.deadline, time.monotonic() + we.wait)
    if we.in_trouble:  # We could not join again: try soon, until the wait is over.
        time.sleep(UNEASY_AFTER)
        return time.monotonic() >= we.deadline
    while (left := we.deadline - time.monotonic()) > 0:
        status(we, f"{left:.0f} s left, heartbeats sent: {coordinator.heart.beats}")
        # On memcached and files, a look asks for each member: so in a crowd we look
        # less often, with 400 members twice a second.
        before = we.asked
        time.sleep(min(left, max(LOOK_EVERY, len(members) / 800)))
        now = look(we, coordinator)
        if now is None:
            we.asked = time.monotonic()  # The backend was silent: we did not sleep.
            continue
        slept = we.asked - before
        # A group is a set: who is new and who is missing are two differences. We say
        # "gone", as Tooz cannot tell a member that left from one that died.
        news = [(text_of(who), "joined") for who in now - members]
        news += [(text_of(who), "gone") for who in members - now]
        for who, what in sorted(news):
            say(we, f"{time.strftime('%H:%M:%S')} {who} {what}, {listing(now)}")
        members = now
        if we.client.encode() not in members:
            warn(we, f"we are not a member of {we.group} any more. Joining again")
            return False
        if lease and slept > lease:
            # On files, our next beat brings us back by itself. But the others have seen
            # us go, and may have acted on it.
            warn(we, f"we slept {slept:.0f} s, longer than our lease. Joining again")
            return False
    return True


@contextlib.contextmanager
def until_it_is_time_to_go(we):
    """Run the block until it ends, or Ctrl-C, SIGTERM or SIGHUP ends it; then go on."""

    def end(number, _):
        if not we.leaving:
            we.leaving = time.monotonic()
            sys.exit(128 + number)
        # Whatever ended us now would leave us in the list for a lease. `timeout` sends
        # its signal twice, `uv run` in a script too: a person's Ctrl-C comes later.
        if number == signal.SIGINT and time.monotonic() - we.leaving > 0.25:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # Or nohup would be undone.
            signal.signal(number, end)
    try:
        try:
            yield
        finally:
            we.leaving = we.leaving or time.monotonic()
    except SystemExit as end_of_wait:
        we.status = end_of_wait.code
    with contextlib.suppress(SystemExit):  # The terminal may have gone.
        status(we, "leaving")
    # A backend that was silent already gets one last chance, of UNEASY_AFTER.
    we.deadline = time.monotonic() if we.in_trouble else math.inf


def give_up(we, error):
    """Say what went wrong, and what to do about it, and end the program (exit 1)."""
    if we.leaving:
        warn(we, f"could not leave {we.group}: {reason(error)}")
        warn(we, "the backend will forget us when our lease ends")
        os._exit(1)
    scheme = we.url.partition("://")[0]
    advice = ADVICE.get(scheme, EXAMPLES)
    if isinstance(error, ImportError):
        what = "-r requirements.txt" if scheme in ADVICE else f"'tooz[{scheme}]'"
        advice = f"Install what is needed: pip install {what}"
    elif isinstance(error, ValueError) and not isinstance(error, OSError):
        advice = EXAMPLES  # A mistake in the URL. Errors of the network can be both.
    advice += "\n  Without a server: file:///tmp/tooz"
    warn(we, f"cannot use {we.backend}: {reason(error)}\n  {advice}")
    os._exit(1)


def reason(error):
    """Return the cause of an error in words. Drivers wrap it, some in empty errors."""
    chain = []
    while error:
        chain.append(error)
        error = error.__cause__ or error.__context__
    # Best are the words of the network, then the server's, which etcd3gw keeps apart.
    # If there are none, the name of the error must do. A page of HTML says nothing.
    texts = [str(one) for one in reversed(chain) if isinstance(one, OSError)]
    texts += [getattr(one, "detail_text", None) for one in chain]
    texts += [str(one) for one in chain]
    texts += [re.sub("(?!^)(?=[A-Z])", " ", type(chain[-1]).__name__).lower()]
    words = next(text for text in texts if text and not text.startswith("<"))
    words = re.sub(r'.*"error": ?"([^"]+)".*', r"\1", words)  # etcd's JSON
    words = re.sub(r"\[Errno -?\d+\] ?| ?\(_ssl\.c.*", "", words)  # Python's numbers
    return "".join(one for one in words[:300] if one.isprintable())


# --- Words ---

ADVICE = {
    "etcd3+http": """Start etcd: etcd --data-dir /tmp/etcd-data
  If it runs with TLS: etcd3+https://HOST?ca_cert=FILE (its authority's certificate).
  If it asks for a password: Tooz cannot give one to etcd.""",
    "etcd3+https": "The certificate of the server's authority goes into ?ca_cert=FILE",
    "memcached": """Start memcached: memcached -u memcache
  If it runs: is that its port?""",
}
EXAMPLES = "Examples: etcd3+http://localhost, memcached://localhost"
EPILOG = """\
Run each client in a terminal of its own. Examples:
  etcd:       tooz_join_group.py clientA group1
  memcached:  tooz_join_group.py clientA group1 memcached://localhost:11211
  no server:  tooz_join_group.py clientA group1 file:///tmp/tooz

BACKEND_URL defaults to $TOOZ_BACKEND_URL, then to etcd3+http://localhost.
Its ?timeout= sets the lease, in seconds: how long the backend keeps a silent
member (and how long we wait for an answer). Quote it for the shell:
  tooz_join_group.py clientA group1 'etcd3+http://localhost?timeout=5'

Exit status: 0 done, 1 could not do it, 2 wrong arguments, 128+n ended by signal n.
"""


def options():
    """Read the command line. On wrong arguments argparse exits, with status 2."""

    def name(text):
        # A "/" would put one group into another on etcd; a space confuses memcached.
        if re.fullmatch(r"[A-Za-z0-9._-]{1,100}", text):
            return text
        raise argparse.ArgumentTypeError("use 1 to 100 of A-Z a-z 0-9 . _ -")

    parser = argparse.ArgumentParser(
        description="Join a group with Tooz, show who comes and goes, and leave.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add, error = parser.add_argument, parser.error
    add("client", metavar="CLIENT", type=name, help="our name")
    add("group", metavar="GROUP", type=name, help="the group to join")
    add("url", metavar="BACKEND_URL", nargs="?", help="any Tooz URL")
    add("--wait", metavar="SECONDS", type=float, default=60, help="time to stay (60)")
    add("--debug", action="store_true", help="show Tooz's own log, and tracebacks")
    # argparse repeats what it does not understand: that may be a URL.
    parser.error = lambda message: error(without_passwords(message))
    we = parser.parse_args()
    if not 0 <= we.wait < math.inf:
        parser.error("--wait takes a number of seconds, 0 or more")
    return we


def check_url(url):
    """Return a URL's timeout (s). Raise ValueError for mistakes that Tooz lets pass."""
    try:
        parts = urllib.parse.urlsplit(url)
    except ValueError:  # Its words may have a part of a password.
        raise ValueError("that is not a URL") from None
    if parts.scheme == "file" and (parts.netloc or not parts.path.startswith("/")):
        raise ValueError("file:// takes an absolute path")
    for host in parts.netloc.rpartition("@")[2].split(","):
        if not re.fullmatch(r"(\[.*\]|[^:]*)(:0*[1-9]\d*)?", host):
            raise ValueError("the port is not a number from 1 to 65535")
    timeout = urllib.parse.parse_qs(parts.query).get("timeout", ["30"])[-1]
    if not re.fullmatch(r"[1-9]\d{0,5}", timeout):
        raise ValueError("timeout= takes a whole number of seconds, 1 to 999999")
    return int(timeout)


def without_passwords(text):
    """Return the text with the passwords of all URLs in it made unreadable."""
    text = re.sub(r"(://[^:@\s]*:)\S*@", r"\1***@", text)
    return re.sub(r"(password=)[^&\s]*", r"\1***", text)


def promises(coordinator, lease):
    """Return what the backend promises: its lease (s), its driver's characteristics."""
    names = sorted(one.name for one in coordinator.CHARACTERISTICS)
    # Every driver works across threads and processes: not worth a word.
    names = [name for name in names if not name.endswith(("THREADS", "PROCESSES"))]
    words = ", ".join(names).lower().replace("_", " ").replace("distributed ", "")
    kept = f"it keeps a silent member for {lease:g} s (the lease); " if lease else ""
    return f"   {kept}Tooz calls it {words}"


def text_of(name):
    """Return a member's name as text. Others may join under any bytes, or a str."""
    text = name.decode(errors="replace") if isinstance(name, bytes) else name
    return "".join(one if one.isprintable() else "?" for one in text)


def listing(members):
    """Return the members as they are always shown: sorted, on one line."""
    return f"members: {', '.join(sorted(map(text_of, members))) or '(none)'}"


def say(we, text, end="\n"):
    """Print a line of the lesson at once. SystemExit(0) if its reader has gone."""
    try:
        print(f"{we.erase}{we.client}: {text}", end=end, flush=True)
    except OSError as error:
        sys.stdout = None  # From here on, print() prints nothing.
        if error.errno in (errno.EPIPE, errno.EIO):  # a pipe's reader, a terminal
            sys.exit(0)
        warn(we, f"cannot write: {error.strerror}")
        sys.exit(1)


def status(we, text):
    """Redraw the status line: in a terminal, unless we run in its background."""
    with contextlib.suppress(OSError):  # stdout is not our terminal, or not any more.
        if we.erase and os.tcgetpgrp(1) == os.getpgrp():
            # A line that is too long for the terminal could not be redrawn.
            room = shutil.get_terminal_size().columns - len(f"{we.client}: ") - 1
            if room > 0:
                say(we, text[:room], end="")


def warn(we, text):
    """Print trouble on stderr; with --debug, the traceback of the error, too."""
    if we.debug and sys.exc_info()[1]:
        text = f"{text}\n{traceback.format_exc()}"
    with contextlib.suppress(OSError):  # Either may have gone, and the other not.
        print(we.erase, end="", flush=True)
    with contextlib.suppress(OSError):
        print(f"{we.client}: {without_passwords(text)}", file=sys.stderr, flush=True)


def main():
    """Run the program; return its exit status."""
    we = options()
    url = we.url or os.environ.get("TOOZ_BACKEND_URL") or "etcd3+http://localhost"
    we.url = re.sub("^etcd3://", "etcd3+http://", url)  # The lesson's driver left Tooz.
    we.backend = without_passwords(we.url)
    if sys.stdout:
        sys.stdout.reconfigure(errors="replace")  # For names that it cannot encode.
    terminal = sys.stdout and sys.stdout.isatty() and os.getenv("TERM") != "dumb"
    we.erase = "\r\x1b[K" if terminal else ""  # Takes the status line off a terminal.
    we.timeout = 30  # How long a request may take (s), until we know the URL's.
    we.deadline = math.inf  # When the wait is over, by time.monotonic().
    we.asked = None  # When we last turned to the backend, by time.monotonic().
    we.status = 0  # Our exit status, if we leave without trouble.
    we.leaving = None  # When we began to leave, by time.monotonic().
    we.joined = we.in_trouble = False
    if we.debug:
        logging.basicConfig()
        logging.getLogger("tooz").setLevel(logging.DEBUG)
    else:
        logging.disable()  # Or the heart would warn, each second, of a silent backend.
        warnings.simplefilter("ignore")  # urllib3 has one for the Python of macOS.
    try:
        if we.url != url:
            say(we, f"{without_passwords(url)} is now {we.backend}")
        with patience(we):
            we.timeout = check_url(we.url)
        join_and_watch(we)
    except SystemExit as end:
        return end.code or we.status
    return we.status


if __name__ == "__main__":
    # A request that is never answered keeps its thread, which would keep us: just go.
    os._exit(main())
