#!/usr/bin/env python3
# /// script
# requires-python = ">=3.9"
# dependencies = ["tooz>=7.0.0", "etcd3gw>=2.4.0", "pymemcache>=4.0.0"]
# ///
"""How do my nodes know who is alive? They join a group, with Tooz.

Run it in two or three terminals at once, each under a name of its own:

    python tooz_join_group.py clientA group1
    python tooz_join_group.py clientB group1

The lesson is the first function, join_and_watch(), and these are its steps:

    1. create a coordinator and start its heartbeat
    2. create the group, or find it there
    3. join it
    4. print its members
    5. wait, and show who comes and goes
    6. leave it and stop

Below it stand two more parts: "Trouble", what a lesson leaves out and a service must
not, and "Words", what goes in and what comes out. It is a companion to the lesson
"Creating, Joining and Leaving Groups" of The Hacker's Guide to Scaling Python:
https://www.educative.io/courses/hackers-guide-scaling-python/creating-joining-and-leaving-groups
"""

import signal

# Until we hear signals, in step 1, Ctrl-C just ends us: no import shows a traceback.
if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import contextlib
import logging
import math
import os
import re
import select
import sys
import threading
import time
import urllib.parse
import urllib.request

try:
    from tooz import coordination
except ImportError as missing:
    sys.exit(f"{missing}. Try .venv/bin/python, or: pip install -r requirements.txt")

LOOK_EVERY = 0.27  # Seconds between two looks: a change shows within 0.3 s.
LEAVING = 25  # Seconds that leaving and stopping may take, all in all.
# What Tooz answers if we were thrown out before we left. No error: we wanted to go.
NOT_A_MEMBER = coordination.MemberNotJoined, coordination.GroupNotCreated


def join_and_watch(url, client, group, wait, screen):
    """Take the six steps. Return 0, or 128 + n after signal n, or 1 if we cannot leave.

    `wait` is in seconds. Raises what Tooz and its driver raise in steps 1 to 4.
    """
    me, group_id = client.encode(), group.encode()  # Tooz takes names as bytes.

    # 1. The coordinator is our line to the backend. Its heart, a thread, beats twice in
    #    each lease: the time for which the backend keeps a member that is silent.
    #    We beat once by hand, too: heartbeat() returns how many seconds that is.
    coordinator = coordination.get_coordinator(url, me)
    coordinator.start(start_heart=True)
    hear_signals(end_the_wait)  # A member that just died of Ctrl-C would stay listed.
    lease = Lease(coordinator.heartbeat(), coordinator.heart)
    screen.say(f"1. started a coordinator on {url}")

    joining = members = None
    try:
        # 2. Whoever comes first creates the group. The call returns a future at once;
        #    get() waits for its result, or raises what went wrong.
        try:
            coordinator.create_group(group_id).get()
            screen.say(f"2. created {group}")
        except coordination.GroupAlreadyExist:
            screen.say(f"2. found {group}")

        # 3. The backend lists us from here on, for as long as our heart beats.
        joining = coordinator.join_group(group_id)
        joining.get()
        screen.say(f"3. joined {group} (lease: {lease.seconds:g} s)")

        # 4. The list is kept by the backend, not by the members: we ask for it.
        members = coordinator.get_members(group_id).get()
        screen.say(f"4. {listing(members)}")

        # 5. Nobody calls us when a member comes or goes: watch() looks again and again.
        #    It never returns: the alarm that we set here ends it, or Ctrl-C does.
        signal.setitimer(signal.ITIMER_REAL, wait or 1e-6)  # 0 would set no alarm.
        watch(coordinator, me, group_id, members, lease, screen)
    except coordination.MemberAlreadyExist:
        coordinator.heart.stop()  # On memcached it would keep a dead owner listed.
        raise
    except SystemExit as end:  # The alarm, or a signal: see end_the_wait().
        status = end.code

    if joining is None:
        return status  # The signal came before we had asked to join.
    if members is not None:
        screen.say(f"5. waited {wait:g} s" if status == 0 else "5. interrupted")

    # 6. We say that we leave, and the others see it at once. If we just stopped
    #    beating, they would go on seeing us until our lease ends.
    screen.status("leaving")
    try:
        joining.get(10)  # Seconds. If a signal came first, the answer is on its way.
        with contextlib.suppress(*NOT_A_MEMBER):
            coordinator.leave_group(group_id).get(10)
        coordinator.stop()  # The heart, too. (It would also leave, but hide errors.)
    except coordination.MemberAlreadyExist:
        return status  # Another has our name: leaving would throw out that one.
    except Exception as error:  # noqa: BLE001 (drivers raise what they like)
        screen.warn(f"could not leave {group}: {reason(error)}; our lease will end it")
        return 1
    screen.say(f"6. left {group} and stopped")
    return status


# --- Trouble ---


def watch(coordinator, me, group_id, members, lease, screen):
    """Show who comes and goes, for ever: only the SystemExit of a signal ends it.

    `members`, a set of bytes, are those shown already. Whatever goes wrong is said, and
    the next round tries again. (Tooz has watchers, such as watch_join_group(). They do
    the same: run_watchers() in tooz/coordination.py calls get_members() and takes the
    two differences.)
    """
    look, trouble_told = None, False
    while True:
        to_go = signal.getitimer(signal.ITIMER_REAL)[0]
        screen.status(f"{to_go:.0f} s to go", f", {lease}")
        # On memcached and files, a look asks for each member. So in a crowd we look
        # less often: twice a second among 400.
        time.sleep(max(LOOK_EVERY, len(members) / 800))
        try:
            if look is None:
                look, asked = coordinator.get_members(group_id), time.monotonic()
            seen, look = members_in(look), None
            # We are not in the list. Or our lease ran out, while we slept or our line was
            # cut: then the others may have seen us go, even if a late beat has brought
            # us back, as it does on files. (So we note late beats only after this.)
            if me not in seen or time.time() > lease.end:
                seen, lease = join_again(coordinator, group_id, screen)
            lease.note_answer()
            trouble_told = False
            # A group is a set: who is new and who is missing are two differences. We
            # say "gone", as Tooz cannot tell a member that left from one that died. (Of
            # ourselves, join_again() tells.)
            news = [(text_of(who), "joined") for who in seen - members - {me}]
            news += [(text_of(who), "gone") for who in members - seen - {me}]
            for who, what in sorted(news):
                screen.say(f"{time.strftime('%H:%M:%S')} {who} {what}, {listing(seen)}")
            members = seen
        except Exception as error:  # noqa: BLE001 (drivers raise what they like)
            # An unfinished look goes on: the next round waits for the same one, so that
            # slow answers arrive, and none queues behind another. Slow is not silent:
            # that there is no answer, we say after 5 s.
            if look and look.done():
                look = None
            if not trouble_told and (look is None or time.monotonic() - asked > 5):
                screen.warn(f"trouble with the backend: {reason(error)}; trying again")
                trouble_told = True


def members_in(look):
    """Return the members that a look found, a set of bytes. Waits for up to 1 s."""
    try:
        return look.get(1)
    except coordination.GroupNotCreated:
        return set()  # A group that is not there has no members.


def join_again(coordinator, group_id, screen):
    """Become a member again; return the members, a set of bytes, and the new lease.

    Raises what Tooz and its driver raise; watch() calls it again, then.
    """
    # If the old lease is over, on etcd, a beat makes a new one. We beat by hand while
    # the heart rests, or it might make another: then nobody would renew ours.
    coordinator.heart.stop()
    if coordinator.heart.wait(2):  # Seconds. Then it hangs in the middle of a beat.
        raise coordination.OperationTimedOut("no answer to a heartbeat")
    lease = Lease(coordinator.heartbeat(), coordinator.heart)
    coordinator.heart.start()
    try:
        # Tooz's own call for steps 2 and 3 in one, as the group may be gone, too. It
        # returns no future, but waits by itself.
        coordinator.join_group_create(group_id)
        screen.say("3. joined again")
    except coordination.MemberAlreadyExist:
        screen.say("3. still listed")  # Us, or a namesake: Tooz cannot tell.
    members = coordinator.get_members(group_id).get()
    screen.say(f"4. {listing(members)}")
    return members, lease


def end_the_wait(number, _):
    """Hear the alarm, Ctrl-C, SIGTERM or SIGHUP: raise SystemExit, once.

    Its code is 0 for the alarm, else 128 + the signal's number.
    """
    hear_signals(end_at_once)
    signal.setitimer(signal.ITIMER_REAL, LEAVING)
    # This may hit the middle of a call of Tooz. Its thread still does all that is to do
    # then, but ends with an error: that would be a traceback.
    threading.excepthook = lambda _: None
    sys.exit(0 if number == signal.SIGALRM else 128 + number)


def end_at_once(number, _):
    """Hear a signal while we leave. Only the alarm and a second Ctrl-C end us now.

    Whatever ends us before we have left leaves us in the list for a lease. `timeout`
    sends its signal twice, `uv run` in a script too: a person's Ctrl-C comes later.
    """
    to_go = signal.getitimer(signal.ITIMER_REAL)[0]
    if number == signal.SIGALRM and to_go == 0:  # Else the wait's alarm comes late.
        if select.select([], [2], [], 0)[1]:  # Not if Ctrl-S has stopped the terminal.
            os.write(2, b"leaving took too long: the backend will forget us\n")
        os._exit(1)
    if number == signal.SIGINT and to_go < LEAVING - 0.25:
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)


def hear_signals(handler):
    """Let the handler hear the alarm, and what may end us, if it is not ignored."""
    for number in signal.SIGALRM, signal.SIGINT, signal.SIGTERM, signal.SIGHUP:
        # What is ignored stays so: somebody may have started us with nohup.
        if number == signal.SIGALRM or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)


def wait_for_our_name(url, client, group, screen):
    """Return when no member has our name; exit (status 1) if one alive has it.

    A name in the list belongs to somebody alive, or to somebody who crashed and whose
    lease still runs. Nobody can tell which, except by waiting for one lease to end.
    """
    me, group_id = client.encode(), group.encode()
    # We look under a name that no client can have: memcached's driver never finds its
    # own name missing. "sync" spares us threads: the call itself does the work.
    scout = coordination.get_coordinator(url, f"{client}?".encode(), executor="sync")
    scout.start()
    enough = scout.heartbeat() + 2  # Backends are a little late in forgetting.
    screen.warn(f"{client} is taken. Is its owner alive? Looking for {enough:g} s")
    limit = time.monotonic() + enough
    while me in members_in(scout.get_members(group_id)):
        to_go = limit - time.monotonic()
        if to_go < 0:
            screen.warn("its owner is alive (or has a longer lease). Take another name")
            sys.exit(1)
        screen.status(f"{to_go:.0f} s left to look at the name {client}")
        time.sleep(LOOK_EVERY)
    scout.stop()
    # The file driver hides a member whose lease is over, and still refuses its name.
    # Leaving under that name frees it. (Elsewhere that could only hit who has it now.)
    if urllib.parse.urlsplit(url).scheme == "file":
        namesake = coordination.get_coordinator(url, me, executor="sync")
        namesake.start()
        with contextlib.suppress(*NOT_A_MEMBER):
            namesake.leave_group(group_id).get()


def reason(error):
    """Return the cause of an error in words. Drivers wrap it, some in empty errors."""
    chain = []  # From the error that we got to its first cause.
    while error:
        chain.append(error)
        error = error.__cause__ or error.__context__
    names = [type(one).__name__ for one in chain]
    said = [str(getattr(one, "detail_text", "") or one) for one in chain]
    # Best are etcd's own words, in JSON that etcd3gw keeps in detail_text, then those
    # of the network. A page of HTML says nothing: the name of the error must do.
    texts = re.findall(r'"(?:error|message)": ?"([^"]+)"', " ".join(said))
    texts += ["no answer" for name in names if re.search("(?i)timed?out", name)]
    texts += [str(one) for one in reversed(chain) if isinstance(one, OSError)]
    texts += [*said, re.sub("(?!^)(?=[A-Z])", " ", names[-1]).lower()]
    words = next(text for text in texts if text and not text.startswith("<"))
    words = re.sub(r"^\[.*?\] ?| ?\(_ssl\.c.*", "", words)  # "[Errno 111] " and such
    return "".join(one for one in words[:300] if one.isprintable())


# --- Words ---

ADVICE = {
    "etcd3+http": """Start etcd: etcd --data-dir /tmp/etcd-data
  If it runs with TLS: etcd3+https://HOST?ca_cert=FILE (its authority's certificate).
  If it asks for a password: Tooz cannot give one to etcd.""",
    "etcd3+https": "The certificate of the server's authority goes into ?ca_cert=FILE",
    "memcached": """Start memcached: memcached -u memcache
  If it runs: is that its port? If localhost is ::1 here: memcached://127.0.0.1""",
}
EXAMPLES = "Examples: etcd3+http://localhost, memcached://127.0.0.1"
EPILOG = """\
Run each client in a terminal of its own. Examples:
  etcd:       tooz_join_group.py clientA group1
  memcached:  tooz_join_group.py clientA group1 memcached://127.0.0.1:11211
  no server:  tooz_join_group.py clientA group1 file:///tmp/tooz
  own lease:  tooz_join_group.py clientA group1 'etcd3+http://localhost?timeout=5'

BACKEND_URL defaults to $TOOZ_BACKEND_URL, then to etcd3+http://localhost. The lease
is the time, in seconds, for which the backend keeps a silent member.
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
    add = parser.add_argument
    add("client", metavar="CLIENT", type=name, help="our name")
    add("group", metavar="GROUP", type=name, help="the group to join")
    add("url", metavar="BACKEND_URL", nargs="?", help="any Tooz URL")
    add("--wait", metavar="SECONDS", type=float, default=60, help="time to stay (60)")
    args = parser.parse_args()
    if not 0 <= args.wait < 1e8:  # The timer of macOS takes no more.
        parser.error("--wait takes a number of seconds, from 0 to 99999999")
    args.url = args.url or os.getenv("TOOZ_BACKEND_URL") or "etcd3+http://localhost"
    return args


def check_url(url):
    """Raise ValueError for mistakes in a URL that Tooz lets pass, or shows badly."""
    try:
        parts = urllib.parse.urlsplit(url)
    except ValueError:  # Its words may have a part of a password.
        raise ValueError("that is not a URL") from None
    if parts.scheme == "file" and (parts.netloc or not parts.path.startswith("/")):
        raise ValueError("file:// takes an absolute path")
    for host in parts.netloc.rpartition("@")[2].split(","):
        if not re.fullmatch(r"(\[.*\]|[^:]*)(:0*[1-9]\d*)?", host):
            raise ValueError("the port is not a number from 1 to 65535")
    for name, value in urllib.parse.parse_qsl(parts.query):
        # With a lease of 0, memcached never forgets, and the heart never rests.
        good = re.fullmatch(r"[1-9]\d{0,5}", value)
        if re.fullmatch("((membership|lock|leader)_)?timeout", name) and not good:
            raise ValueError(f"{name}= takes a whole number of seconds, 1 to 999999")


def advice(url, error):
    """Return what to do about an error that kept us from joining."""
    if isinstance(error, ImportError):
        return "pip install -r requirements.txt, or 'tooz[redis]', 'tooz[zookeeper]'"
    if isinstance(error, ValueError) and not isinstance(error, OSError):
        return EXAMPLES  # A mistake in the URL. Errors of the network can be both.
    parts, proxies = urllib.parse.urlsplit(url), urllib.request.getproxies()
    scheme, host = parts.scheme, parts.hostname or "localhost"
    proxy = proxies.get(scheme.replace("etcd3+", "")) or proxies.get("all")
    if scheme.startswith("etcd3+") and proxy and not urllib.request.proxy_bypass(host):
        return f"We asked through the proxy {proxy}. To go without: NO_PROXY={host}"
    return ADVICE.get(scheme, EXAMPLES)


def text_of(name):
    """Return a member's name as text. Others may join under any bytes, or a str."""
    text = name.decode(errors="replace") if isinstance(name, bytes) else name
    return "".join(one if one.isprintable() else "?" for one in text)


def listing(members):
    """Return the members as they are always shown: sorted, on one line."""
    return f"members: {', '.join(sorted(map(text_of, members))) or '(none)'}"


class Lease:
    """How long the backend keeps us if we are silent, and what is left of that.

    `seconds` is what heartbeat() returned: "the number of seconds to wait before
    sending a new heartbeat", says Tooz. For its drivers that is the lease, or another
    timeout of the URL, if that is shorter. Drivers that have no groups return None.
    """

    def __init__(self, seconds, heart):
        self.seconds, self.heart, self.beats = seconds or 0, heart, None
        self.note_answer()

    def note_answer(self):
        """Note that the backend has answered: a beat sent before that has arrived, too.

        A beat alone proves nothing: memcached's are sent without asking for an answer.
        """
        if self.heart.beats != self.beats:
            # Not time.monotonic(): while a laptop sleeps, that may stand still.
            self.beats, self.end = self.heart.beats, time.time() + self.seconds

    def __str__(self):
        """Return what is left as a bar, for the status line."""
        left = max(0, math.ceil(self.end - time.time()))
        bar = "#" * round(10 * left / self.seconds)
        return f"lease [{bar:.<10}] {f'{left} s' if left else 'is over'}"


class Screen:
    """What the learner sees: each line at once, with our name before it.

    The story goes to stdout, trouble to stderr. A terminal has a status line, too.
    """

    def __init__(self, client):
        self.client, self.line = client, ""
        if sys.stdout:
            sys.stdout.reconfigure(errors="replace")  # For names that it cannot encode.
        terminal = sys.stdout and sys.stdout.isatty() and os.getenv("TERM") != "dumb"
        self.erase = "\r\x1b[K" if terminal else ""  # Takes the status line off.

    def say(self, text):
        """Print a line of the story."""
        self.put(f"{self.erase}{self.named(text)}\n{self.line}")

    def warn(self, text):
        """Print a line of trouble."""
        self.put(self.erase)
        self.put(self.named(text) + "\n", sys.stderr)

    def status(self, text, more=""):
        """Redraw the status line: in a terminal, unless we run in its background."""
        self.line = ""
        # An OSError: stdout is not our terminal, or not any more.
        with contextlib.suppress(OSError):
            if self.erase and os.tcgetpgrp(1) == os.getpgrp():
                # A line that is too long for the terminal could not be redrawn.
                room = (os.get_terminal_size(1).columns or 80) - 1
                text = self.named(text)
                self.line = (text + more if len(text + more) <= room else text)[:room]
                self.put(self.erase + self.line)

    def named(self, text):
        """Return the text with our name before it, and no password of a URL in it."""
        text = re.sub(r"(://[^:@\s]*:)\S*@", r"\1***@", text)
        return f"{self.client}: " + re.sub(r"(password=)[^&\s]*", r"\1***", text)

    def put(self, text, stream=None):
        """Print as it is. If nobody reads any more, we hang up."""
        try:
            print(text, end="", file=stream, flush=True)
        except OSError:
            if stream is None:
                sys.stdout = None  # From here on, print() prints nothing there.
                signal.raise_signal(signal.SIGHUP)


def main():
    """Run the program; return its exit status."""
    args = options()
    url = re.sub("^etcd3://", "etcd3+http://", args.url)
    screen = Screen(args.client)
    logging.disable()  # Or the heart would warn, each second, of a silent backend.
    logging.captureWarnings(True)  # urllib3 has one for the Python of macOS.
    try:
        if url != args.url:  # The lesson's driver has left Tooz.
            screen.say(f"{args.url} is now {url}")
        check_url(url)
        while True:
            screen.status(f"asking {url}")
            try:
                return join_and_watch(url, args.client, args.group, args.wait, screen)
            except coordination.MemberAlreadyExist:
                pass  # Below, or this error would be the cause of all that come later.
            wait_for_our_name(url, args.client, args.group, screen)
    except SystemExit as end:
        return end.code
    except Exception as error:  # noqa: BLE001 (drivers raise what they like)
        what_to_do = f"{advice(url, error)}\n  Without a server: file:///tmp/tooz"
        screen.warn(f"cannot use {url}: {reason(error)}\n  {what_to_do}")
        return 1
    finally:
        screen.put(screen.erase)


if __name__ == "__main__":
    # A request that is never answered keeps its thread, which would keep us: just go.
    os._exit(main())
