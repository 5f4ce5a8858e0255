"""Record the picture at the top of the README: `tests/run picture` writes picture.svg.

The scene is played by the script itself, in two shells in real terminals, on files, with
a lease of 5 s. What their screens show is filmed, and becomes an animated SVG. Over each
screen stands a title: what is done there, and when.
"""

import contextlib
import os
import pathlib
import re
import shutil
import signal
import sys
import time
from xml.etree import ElementTree

import pexpect
import psutil
import pyte
from conftest import ROOT, SCRIPT, wait_until

PICTURE = pathlib.Path(__file__).with_suffix(".svg")
FOLDER = pathlib.Path("/tmp/tooz")
A, B = "clientA", "clientB"
COLUMNS = 58  # So that it can be read on a telephone, too.
ROWS = {A: 14, B: 23}  # Just enough: nothing scrolls away.
# Only A has a status line: the shell's "Killed" would be written into B's.
TERM = {A: "linux", B: "dumb"}
SHUTTER = 400  # ms from frame to frame, at least.
PAUSE = 5000  # ms for the last frame, before all begins again.
# The renderer puts the frames into a template. Its cells are 8 x 17.
SIZE = COLUMNS, len(ROWS) + sum(ROWS.values())
WIDTH, HEIGHT = 8 * SIZE[0], 17 * SIZE[1]
TEMPLATE = f"""\
<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"
 viewBox="0 0 {WIDTH + 16} {HEIGHT + 16}" width="{WIDTH + 16}">
<defs>
<t:template_settings xmlns:t="https://github.com/nbedos/termtosvg">
<t:screen_geometry columns="{SIZE[0]}" rows="{SIZE[1]}"/><t:animation type="css"/>
</t:template_settings>
<style id="generated-style"/>
<style>
#screen {{font-family: ui-monospace, Menlo, Consolas, 'DejaVu Sans Mono', monospace}}
.background {{fill: #1c2128}} .foreground {{fill: #d7dde4}}
.color0 {{fill: #1c2128}} .color8 {{fill: #3d4651}} .color11 {{fill: #ffd75f}}
/* Who prefers less motion sees the last frame: all is over before it begins. */
@media (prefers-reduced-motion: reduce) {{ #screen_view {{
animation-delay: calc(-1 * var(--animation-duration)); animation-iteration-count: 1
}} }}
</style>
</defs>
<rect width="100%" height="100%" rx="8" class="background"/>
<svg id="screen" x="8" y="8" width="{WIDTH}" height="{HEIGHT}"
 viewBox="0 0 {WIDTH} {HEIGHT}"/>
</svg>"""
HREF = "{http://www.w3.org/1999/xlink}href"
# The colours of a row, as the template names them: the text, and what is behind it.
LINE, TITLE = ("foreground", "background"), ("foreground", "color8")
NEWEST = ("color0", "color11")  # The title of whom something was done to last.


def play(start, wait=lambda seconds: None, effect=lambda seconds: None):
    """A joins. B joins and leaves, joins again and is killed. Return A, and B twice.

    start(name) starts a client of that name and returns it: it can be any client of
    conftest.py. The film waits now and then, so that one can follow, and tells the effect
    of each deed: how many seconds later A has seen it.
    """
    a = start(A)
    a.sees("start acting .*\n")
    wait(3)  # A's lease runs down, and a heartbeat renews it.
    twice = []
    for number in signal.SIGINT, signal.SIGKILL:
        b = start(B)
        a.sees(f"{B} joined, members: .*\n")
        b.sees("start acting .*\n")
        wait(2)
        b.hit(number)
        hit = time.monotonic()
        a.sees(f"{B} gone, members: .*\n")
        effect(time.monotonic() - hit)
        if number == signal.SIGINT:
            b.sees("6. left .*\n")
        wait(2)
        twice.append(b)
    return [a, *twice]


class Shell(pexpect.spawn):
    """A shell in a real terminal, with a title. Whoever waits for its output, films."""

    def __init__(self, name, film):
        path = f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"
        plain = {"PATH": path, "PS1": "$ ", "TERM": TERM[name], "HISTFILE": ""}
        size = {"dimensions": (ROWS[name], COLUMNS), "encoding": "utf-8"}
        sh = "sh -c 'stty -echoctl; exec sh'"  # Ctrl-C is not to show as ^C.
        super().__init__(sh, cwd=ROOT, env={**os.environ, **plain}, **size)
        self.name, self.title, self.film = name, name, film
        self.transcript, self.seen = "", 0
        self.screen = pyte.Screen(COLUMNS, ROWS[name])
        self.stream = pyte.Stream(self.screen)

    def hit(self, number):
        """Press Ctrl-C, or kill the script."""
        if number == signal.SIGINT:
            self.say("Ctrl-C: it leaves")
            self.sendintr()
        else:
            self.say("kill -9")
            psutil.Process(self.pid).children()[0].kill()

    def say(self, deed):
        """Put it into the title, with the time."""
        self.title = f"{self.name}  {time.strftime('%H:%M:%S')} {deed}"
        self.film.newest = self

    def sees(self, pattern):
        """Film until the rest of the output has the pattern."""
        pattern = re.compile(pattern)
        self.film.roll(lambda: pattern.search(self.transcript, self.seen))
        self.seen = pattern.search(self.transcript, self.seen).end()

    def rows(self):
        """Read, and return the title and the lines of the screen, with their colours."""
        with contextlib.suppress(pexpect.TIMEOUT):
            output = self.read_nonblocking(65536, timeout=0)
            self.transcript += output
            self.stream.feed(output)
        colours = NEWEST if self.film.newest is self else TITLE
        title = f" {self.title}".ljust(COLUMNS), colours
        return [title, *((line.rstrip(), LINE) for line in self.screen.display)]


class Film:
    """Two shells, one above the other, and frames: each is a time in ms, and its rows."""

    def __init__(self):
        self.newest, self.frames = None, []
        self.shells = {name: Shell(name, self) for name in ROWS}
        self.begun = time.monotonic()

    def start(self, name):
        """Type the command line of the script."""
        shell = self.shells[name]
        shell.sees(r"\$ ")
        shell.say("joins")
        url = f"file://{FOLDER}?timeout=5"
        shell.sendline(f"python {SCRIPT.name} {name} group1 '{url}'")
        return shell

    def effect(self, seconds):
        """Put into A's title that B is gone, and how much later."""
        later = f"{seconds:.0f} s later" if seconds >= 1 else "at once"
        self.shells[A].say(f"{B} gone, {later}")

    def wait(self, seconds):
        """Film for so many seconds."""
        end = time.monotonic() + seconds
        self.roll(lambda: time.monotonic() > end)

    def roll(self, it_is_so):
        """Film until the function returns something true."""
        wait_until(lambda: self.shoot() or it_is_so())

    def shoot(self):
        """Take a frame, if it is time for one, and if there is something new."""
        now = int(1000 * (time.monotonic() - self.begun))
        rows = [row for shell in self.shells.values() for row in shell.rows()]
        if self.frames and now < self.frames[-1][0] + SHUTTER:
            return
        if not self.frames or rows != self.frames[-1][1]:
            self.frames.append((now, rows))

    def write(self, path):
        """Write the frames as an SVG that repeats them for ever."""
        # Only who makes the picture has the renderer: the tests do without.
        from termtosvg.anim import CharacterCell, render_animation
        from termtosvg.term import TimedFrame

        end = self.frames[-1][0] + PAUSE, []
        frames = []
        for (at, rows), (until, _) in zip(self.frames, [*self.frames[1:], end]):
            cells = {
                y: {x: CharacterCell(one, *colours) for x, one in enumerate(text)}
                for y, (text, colours) in enumerate(rows)
            }
            frames.append(TimedFrame(at, until - at, cells))
        render_animation(frames, SIZE, path, TEMPLATE.encode())


def story(path=PICTURE):
    """Return what the script says in the last frame: a list of lines for each client.

    Lines that were wrapped are whole again. The status lines are no part of it.
    """
    root = ElementTree.parse(path)
    # Each frame refers to its rows, as most of them are in many frames.
    rows = {f"#{one.get('id')}": one for one in root.iterfind(".//{*}g[@id]")}
    last = root.find(".//*[@id='screen_view']")[-1].iterfind("{*}use")
    shown = ["".join(rows[one.get(HREF)].itertext()) for one in last]
    text = "".join(row if len(row) == COLUMNS else row + "\n" for row in shown)
    # Each screen begins with its title, and that with the name.
    _, *screens = re.split(rf"(?m)^ (?:{A}|{B})", text)
    lines = [re.findall(r"(?m)^\d\d:\d\d:\d\d .*", screen) for screen in screens]
    return dict(zip(ROWS, lines))


def main():
    """Play the scene, film it, and write the picture."""
    # Or the shells would ignore Ctrl-C, if we were started by a script's &.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    FOLDER.mkdir()  # Nobody else's: we remove it.
    try:
        film = Film()
        play(film.start, film.wait, film.effect)
        film.wait(1)
    finally:
        shutil.rmtree(FOLDER)
    film.write(PICTURE)


if __name__ == "__main__":
    main()
