"""Play a stream in the browser while it is made: a small web server, and the stream it plays.

    python generate.py --live

    browser (live.html)                server
    start: prompt, seed            ->  a thread: blocks -> decoder -> writer -> an mp4 that grows
    film: into a MediaSource      <-   the bytes of this mp4, as they are written
    report: seconds played so far  ->  the thread waits while it is AHEAD seconds ahead
            new blocks, passes    <-   ... and ends when no report has come for SILENCE seconds
    prompt: for the next block     ->  one more cue for `generate.stream`
    stop                           ->  the film of the finished blocks is kept, if it has a name

A film without a name grows among the temporary files until its stream ends: 0.4 GB an hour.

Who may ask.  Any page in a browser may send requests to this machine, so each request must name
this server as its Host and come from its own page (Origin). Everything but the page itself is a
POST, for which browsers always tell the origin. If other machines can reach the server, the link
has a random token as well.
"""

import contextlib
import ipaddress
import json
import secrets
import socket
import sys
import tempfile
import threading
import time
import webbrowser
from collections import deque
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count, islice
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from film import page
from film.filming import StopRequest, in_one_line, open_movie, run
from film.mp4 import check_film
from film.passes import PassPictures
from masks import block_interval
from plumbing import files
from plumbing.stopwatch import Stopwatch

ACTIONS = "start", "film", "report", "prompt", "stop"
A_DAY = "86400"  # seconds of a stream that nobody stops
AHEAD, SILENCE = 3, 5  # seconds: how far ahead of the viewer; after which silence nobody watches
CODECS = 'video/mp4; codecs="avc1.640028,mp4a.40.2"'  # H.264 and AAC, as film/mp4.py writes them
REFUSED = "refused: open the link that generate.py printed"
MOST_BYTES = 1 << 16  # of a request
HEADERS = {
    "Cache-Control": "no-store",
    # no other page may embed or read this one, and nothing comes from elsewhere
    "Content-Security-Policy": "default-src 'self' 'unsafe-inline' data: blob:; "
    "frame-ancestors 'none'; form-action 'none'; base-uri 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "same-origin",  # the token is in the address
    "X-Content-Type-Options": "nosniff",
}


class Session:
    """One stream: a thread makes it, at most AHEAD seconds ahead of its viewer."""

    def __init__(self, cues, seed, studio, path):
        """cues: list of `generate.Cue`, which grows; path: of the film, None: do not keep it."""
        self.id, self.cues, self.seed, self.studio = secrets.token_hex(8), cues, seed, studio
        self.folder = None if path else tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        self.path = path or Path(self.folder.name, "film.mp4")
        self.ending, self.error, self.next_prompt = StopRequest(), "", None
        self.played, self.last_report = 0.0, time.monotonic()
        self.watch, self.blocks = Stopwatch(studio.request.device), []  # blocks: for the page
        self.strips = deque(maxlen=1)  # the page keeps the earlier ones
        self.decoder = studio.source.decoder(self.watch.watch)
        self.movie = open_movie(self.path, self.decoder, self.watch)
        self.movie.partial.touch()  # the encoder opens it later than the page asks for it
        self.growing = open(self.movie.partial, "rb")  # stays readable when the file is deleted
        self.thread = threading.Thread(target=self._make)
        self.thread.start()

    def _make(self):
        blocks = self.studio.stream(self.cues, self.seed)
        blocks = self._paced(self.studio.pictures.of_blocks(blocks, self.strips))
        _, errors = run(blocks, self.decoder, self.movie, self.watch, None, self.ending)
        self.error = in_one_line(errors[0]) if errors else ""
        if self.folder:
            self.folder.cleanup()
        elif self.movie.frames:
            print(f"wrote {self.movie.path}")  # another name if another run wrote this one

    def _paced(self, blocks):
        """Yield the blocks, each when it is due; end when nobody watches."""
        request, before = self.studio.request, self.cues[0].prompt
        table = page.CacheTable(request.num_blocks, request.window)
        for block in blocks:
            low, high = block_interval(block.index, request.cfg)
            prompt = [cue.prompt for cue in self.cues if cue.seconds <= low][-1]
            held = table.next_row(page.forgets(before, prompt, request.cfg))
            before = prompt
            shown = {"interval": [low, high], "held": held, "strip": self.strips[-1]}
            self.blocks.append({**shown, "prompt": prompt})
            yield block
            while self.is_watched() and high > self.played + AHEAD:
                time.sleep(0.02)
            if not self.is_watched():
                return
            self.watch.lap()  # waiting is no part of the next block's time
            words, self.next_prompt = self.next_prompt, None  # at once: the page may set it again
            if words:
                self.cues.append(self.cues[0]._replace(seconds=high, prompt=words))

    def is_watched(self) -> bool:
        return not self.ending.is_asked and time.monotonic() < self.last_report + SILENCE

    # what the page may ask

    def film(self):
        """Return an iterator over the bytes of the film while it is written, to its end."""
        growing, self.growing = self.growing, None
        if not growing:
            raise ValueError("this film is played already; press stop, then start")
        return self._bytes(growing)

    def _bytes(self, growing):
        with growing:
            while True:
                ended = not self.thread.is_alive()  # asked first: nothing is written after it
                if data := growing.read(MOST_BYTES):
                    yield data
                elif ended:
                    return
                else:
                    time.sleep(0.01)

    def report(self, played, known) -> dict:
        """Note the second that is played; return what is new since the first `known` blocks."""
        self.played, self.last_report = float(played), time.monotonic()
        ended, watch = not self.thread.is_alive(), self.watch
        new = range(known, min(len(watch.decoding), len(watch.written)))
        for block in self.blocks[max(0, known - 2 * AHEAD) : known]:
            block.pop("strip", None)  # a long stream does not fill the memory
        return {
            "blocks": [
                {
                    **self.blocks[k],
                    "made": watch.passes[k] + watch.decoding[k],
                    "written": watch.written[k],
                }
                for k in new
            ],
            "ttfc": watch.ttfc,
            "ended": ended,
            "error": self.error,
        }

    def prompt(self, words) -> dict:
        """Change the prompt from the next block on.  Raises ValueError if it cannot be read."""
        self.studio.read(words)  # not by the thread: at full size it takes its time
        self.next_prompt = words
        return {}

    def stop(self) -> dict:
        """End the stream after its block."""
        self.ending.is_asked = True
        return {}


class Studio:
    """What all streams share, and the one that runs."""

    def __init__(self, request, source, stream):
        """source: what `open_source` returned; stream: `generate.stream`."""
        self.request, self.source = request, source
        picture = source.picture(request.image)
        self.stream = lambda cues, seed: stream(
            source.net, cues, request.seconds, seed, request.window, request.steps,
            read=source.read, picture=picture,
        )  # fmt: skip
        self.pictures = PassPictures(source.net, request.asked()["passes_a_block"])
        self.session, self.lock = None, threading.Lock()
        for _ in islice(self.stream(request.cues, 0), 2):
            pass  # the first passes of a process are slower than all later ones

    def start(self, words, seed) -> dict:
        """Begin a stream.  Raises ValueError if one runs, or for a prompt that cannot be read."""
        if not (isinstance(seed, int) and 0 <= seed < 2**32):
            raise ValueError(f"seed {seed}: expected a whole number from 0 to {2**32 - 1}")
        self.read(words)
        with self.lock:
            if self.session and self.session.is_watched() and self.session.thread.is_alive():
                raise ValueError("another page plays a stream; stop it there, or close that page")
            self.end()
            cue = self.request.cues[0]._replace(prompt=words)
            self.session = Session([cue], seed, self, self._free_path())
        return {"id": self.session.id}

    def read(self, words):
        """Read a prompt, so that the stream finds it read.  Raises ValueError if it cannot be."""
        with self.lock:  # at full size, one text encoder at a time
            self.source.read(words)

    def _free_path(self):
        """Return the name of the next film: NAME.mp4, NAME-2.mp4, ...; None without --out."""
        if not (self.request.out and self.session):
            return self.request.out
        film = Path(self.request.out)
        names = (film.with_stem(f"{film.stem}-{n}") for n in count(2))
        return next(name for name in names if not name.exists())

    def end(self):
        """End the stream that runs, and wait for its film."""
        if self.session:
            self.session.stop()
            self.session.thread.join()
            if self.session.growing:  # nobody asked for its film
                self.session.growing.close()

    def answer(self, action, asked):
        """Carry out one of ACTIONS: a dict for the page, or an iterator over bytes of the film."""
        if action == "start":
            return self.start(**asked)
        if not self.session or asked.pop("id", None) != self.session.id:
            raise ValueError("this stream has ended; press start")
        return getattr(self.session, action)(**asked)


class Handler(BaseHTTPRequestHandler):
    """Answer one request of a browser."""

    timeout = 10  # seconds until a silent connection is closed

    def do_GET(self):
        if self._is_welcome():
            if urlsplit(self.path).path == "/":
                self._send(200, self.server.page, "text/html")
            else:
                self._send(404, "no such page")

    def do_POST(self):
        if not self._is_welcome():
            return
        action = urlsplit(self.path).path[1:]
        if action not in ACTIONS:
            return self._send(404, "no such page")
        try:
            found = self.server.studio.answer(action, self._asked())
        except Exception as error:  # also of libraries: the server lives on
            return self._send(400, in_one_line(error))
        if isinstance(found, dict):
            return self._send(200, json.dumps(found), "application/json")
        self._send_head(200, "video/mp4")
        for data in found:
            self.wfile.write(data)

    def _is_welcome(self) -> bool:
        """Refuse requests for another host, from another page, or without the token."""
        host, address = self.headers.get("Host", ""), urlsplit(self.path)
        token = parse_qs(address.query).get("token", [""])[0]
        is_welcome = (
            self.server.is_called(host)
            and self.headers.get("Origin") in (None, f"http://{host}")
            and secrets.compare_digest(token.encode(), self.server.token.encode())
        )
        if not is_welcome:
            self._send(403, REFUSED)
        return is_welcome

    def _asked(self) -> dict:
        """Return the JSON of a request's body."""
        length = int(self.headers.get("Content-Length", -1))
        if not 0 <= length <= MOST_BYTES:
            raise ValueError(f"expected 0 to {MOST_BYTES} bytes")
        return json.loads(self.rfile.read(length))

    def _send(self, status, text, kind="text/plain"):
        data = text.encode("utf-8", "replace")
        self._send_head(status, f"{kind}; charset=utf-8", len(data))
        self.wfile.write(data)

    def _send_head(self, status, kind, length=None):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        if length is not None:  # else the end of the connection is the end of the film
            self.send_header("Content-Length", str(length))
        for header in HEADERS.items():
            self.send_header(*header)
        self.end_headers()

    def log_message(self, *_):
        """Print nothing: a page reports four times a second."""


class Server(ThreadingHTTPServer):
    """The address at which a `Studio` answers."""

    daemon_threads = True  # an open connection does not keep the process alive

    def __init__(self, host, port):
        try:
            super().__init__((host, port), Handler)
        except OSError as error:
            reason = f"cannot be opened ({files.reason_of(error)}); choose another"
            raise ValueError(f"--host {host} --port {port}: {reason}") from None
        self.page = self.studio = None  # set by `open_server`
        self.token, self.names = "", {"localhost"}
        if not is_loopback(host):
            self.token = secrets.token_urlsafe(16)
            self.names |= {host.lower(), socket.gethostname().lower()}

    @property
    def link(self) -> str:
        host, port = self.server_address[:2]
        host = socket.gethostname() if host == "0.0.0.0" else host
        return f"http://{host}:{port}/" + (f"?token={self.token}" if self.token else "")

    def is_called(self, host) -> bool:
        """Return whether a Host header names this server."""
        # Trap, DNS rebinding: the owner of any name can let it point here, and a page under this
        # name is then of the same origin. Nobody owns an address in this way.
        with contextlib.suppress(ValueError):
            name = urlsplit(f"//{host}").hostname or ""
            return name in self.names or is_loopback(name) or self.token and is_address(name)
        return False

    def handle_error(self, *address):
        # a page that was closed, or an address that is none
        if not isinstance(sys.exc_info()[1], (OSError, ValueError)):
            super().handle_error(*address)


def is_address(host) -> bool:
    """Return whether this is an address, in numbers."""
    with contextlib.suppress(ValueError):
        return bool(ipaddress.ip_address(host))
    return False


def is_loopback(host) -> bool:
    """Return whether only this machine can reach the host.

    >>> is_loopback("127.0.0.1"), is_loopback("localhost"), is_loopback("0.0.0.0")
    (True, True, False)
    """
    return host == "localhost" or is_address(host) and ipaddress.ip_address(host).is_loopback


def serve(args, *functions):
    """Play streams until a signal comes; arguments as for `open_server`."""
    with StopRequest() as stop, contextlib.suppress(KeyboardInterrupt):
        stop.may_interrupt = True
        with open_server(args, *functions) as server:
            print(f"{server.link}  (Ctrl-C ends it)", flush=True)
            if not args.no_browser:
                open_browser(server.link)
            try:
                server.serve_forever()
            finally:
                server.studio.end()
    print("ended")


def open_server(args, check_args, open_source, stream) -> Server:
    """Check the command line of `generate.py --live`, and load; the functions are generate.py's."""
    for name in ("html", "report", "prompts", "out_dir"):
        if vars(args)[name]:
            name = name.replace("_", "-")
            raise ValueError(f"--live does not go together with --{name}; leave one of them out")
    if len(args.prompt or ()) > 1:
        raise ValueError("--live takes one --prompt; type the next one into the page")
    if args.out:
        check_film(args.out)
    args.seconds = args.seconds or A_DAY
    request = check_args(args)._replace(out=args.out)
    server = Server(args.host or "127.0.0.1", args.port or 0)  # before loading, which takes longer
    server.page = page_of(request)
    server.studio = Studio(request, open_source([request]), stream)
    return server


def page_of(request) -> str:
    """Return the page."""
    cfg, prompt = request.cfg, request.cues[0].prompt
    table = page.CacheTable(request.num_blocks, request.window)
    held = [table.next_row() for _ in range(request.window + 3)]
    about = page.about_cache(held, cfg, cfg.is_toy, has_changes=True)
    if not cfg.is_toy:
        about += " Pictures of the passes are drawn in the toy only."
    data = {
        "codecs": CODECS, "prompt": prompt, "seed": request.seed, "about": about,
        "hint": "a colour, a speed and a material, or some of them" if cfg.is_toy else "any text",
        "blocks": [], "held": [], "strips": [], "made": [], "prompts": [],
    }  # fmt: skip
    aspect = f"{cfg.width} / {cfg.height}"
    return page.fill("live.html", {"data": page.in_script(data), "aspect": aspect})


def open_browser(link):
    """Open the link, unless the only browser would take over this terminal."""
    with contextlib.suppress(webbrowser.Error):
        if type(browser := webbrowser.get()) is not webbrowser.GenericBrowser:
            browser.open(link)
