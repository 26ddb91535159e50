"""The live page: who may ask, one paced stream at a time, and what a browser plays of it."""

import http.client
import io
import json
import struct
import tempfile
import threading
import time
from base64 import b64decode
from pathlib import Path

import av
import pytest
import torch
from helpers import SMALL, run_here, save_small_student

import config
import generate
from film import decoders, live
from film.mp4 import Movie
from film.passes import PassPictures
from film.writer import to_planes
from plumbing.browser import CHROMIUM, opened
from studies.live import CLOCK, Process, longest_gap
from toy import codec as toy_codec
from toy import source as toy_source

FILM = "film.mp4"


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    return save_small_student(tmp_path_factory.mktemp("live") / "student")


@pytest.fixture
def start(student, tmp_path, monkeypatch):
    """Start a server with a tiny random student: options of generate.py -> Client."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(config.CONFIGS, "toy", SMALL)
    monkeypatch.setitem(toy_source.WEIGHTS, "toy", student)
    clients = []

    def start(*options):
        args = generate.options().parse_args(["--live", "--config", "toy", *map(str, options)])
        functions = generate.check_args, generate.open_source, generate.stream
        server = live.open_server(args, *functions)
        threading.Thread(target=server.serve_forever, args=[0.05]).start()
        clients.append(Client(server))
        return clients[-1]

    yield start
    for client in clients:
        client.close()


class Client:
    """A page without a browser."""

    def __init__(self, server):
        self.server, self.known, self.connections = server, [], []
        self.place = "127.0.0.1", server.server_address[1]
        self.host = f"{self.place[0]}:{self.place[1]}"

    def request(self, method, path, body=None, **headers):
        """-> status, headers, open answer."""
        connection = http.client.HTTPConnection(*self.place, timeout=20)
        self.connections.append(connection)
        head = {"Host": self.host, **{k.replace("_", "-"): v for k, v in headers.items()}}
        connection.request(method, path, body, head)
        answer = connection.getresponse()
        return answer.status, answer.headers, answer

    def close(self):
        self.server.studio.end()
        self.server.shutdown()
        self.server.server_close()
        for connection in self.connections:
            connection.close()

    def ask(self, action, **asked):
        """-> what the page gets, or the line that it shows."""
        status, _, answer = self.request("POST", f"/{action}", json.dumps(asked))
        text = answer.read().decode()
        return json.loads(text) if status == 200 else text

    def start(self, words="red", seed=0):
        self.known, self.id = [], self.ask("start", words=words, seed=seed)["id"]

    def film(self):
        return self.request("POST", "/film", json.dumps({"id": self.id}))[2]

    def report(self, played=0.0):
        news = self.ask("report", id=self.id, played=played, known=len(self.known))
        self.known += news["blocks"]
        return news

    def watch_until(self, condition, played=0.0, seconds=20):
        """Report the time that is played until a condition on the report holds; return it."""
        end = time.monotonic() + seconds
        while not condition(news := self.report(played)):
            assert time.monotonic() < end, news
            time.sleep(0.02)
        return news

    def watch_to_the_end(self):
        return self.watch_until(lambda news: news["ended"], played=1000)


def boxes(data):
    """Kinds of the boxes of an mp4, and the bytes after the last whole one."""
    kinds = []
    while len(data) >= 8 and len(data) >= (length := struct.unpack(">I", data[:4])[0]):
        kinds.append(data[4:8].decode())
        data = data[length:]
    return kinds, data


def packets(film):
    """Times and bytes of all packets of a film, by stream."""
    with av.open(film) as opened_film:
        found = [
            (p.stream.type, float(p.pts * p.time_base), bytes(p))
            for p in opened_film.demux() if p.dts is not None
        ]  # fmt: skip
    return sorted(found)


# ---- who may ask ----


def test_only_the_page_is_served(start):
    """Under its own address, with headers that keep other pages away; nothing else is."""
    client = start()
    status, headers, answer = client.request("GET", "/")
    assert status == 200 and answer.read().decode().startswith("<!DOCTYPE html>")
    assert headers["Cross-Origin-Resource-Policy"] == "same-origin"
    assert "frame-ancestors 'none'" in headers["Content-Security-Policy"]
    for path in ("/generate.py", "/film/live.html", "/../README.md", "/film", "/start"):
        assert client.request("GET", path)[0] == 404, path
    for path in ("/", "/answer", "/_paced", "/end"):
        assert client.request("POST", path, "{}")[0] == 404, path
    assert client.request("PUT", "/", "{}")[0] == 501


FOREIGN = [
    {"Host": "evil.example"},
    {"Host": "localhost.evil.example"},
    {"Host": "192.168.1.7"},
    {"Host": ""},
    {"Host": "["},
    {"Origin": "http://evil.example"},
    {"Origin": "null"},
    {"Origin": "http://127.0.0.1:1"},
    {"Origin": "https://{}"},
]


@pytest.mark.parametrize("headers", FOREIGN, ids=str)
def test_a_foreign_host_or_origin_is_refused(start, headers):
    """Also under a name that leads here (DNS rebinding); nothing is shown, nothing starts."""
    client = start()
    headers = {name: value.format(client.host) for name, value in headers.items()}
    body = json.dumps({"words": "red", "seed": 0})
    for method, path in (("GET", "/"), ("POST", "/start")):
        status, _, answer = client.request(method, path, body, **headers)
        assert status == 403 and answer.read() == live.REFUSED.encode()
    assert client.server.studio.session is None


@pytest.mark.parametrize("host", ["localhost:{}", "127.0.0.1:{}", "localhost:8000", "[::1]:8000"])
def test_own_names_are_accepted(start, host):
    """At any port: a tunnel may have another one."""
    client = start()
    host = host.format(client.place[1])
    assert client.request("GET", "/", Host=host, Origin=f"http://{host}")[0] == 200


def test_other_machines_need_the_token(start):
    """--host makes a link with a random token, without which there is not even the page."""
    client, other = start("--host", "0.0.0.0"), start("--host", "0.0.0.0")
    token = client.server.link.partition("/?token=")[2]
    assert len(token) > 20 and token not in other.server.link
    for query in ("", "?token=", "?token=x", f"?token={token}x", "?token=%ff"):
        assert client.request("GET", f"/{query}")[0] == 403
        assert client.request("POST", f"/start{query}", "{}")[0] == 403
    path = f"/?token={token}"
    assert client.request("GET", path)[0] == client.request("GET", path, Host="10.0.0.7")[0] == 200
    assert client.request("GET", path, Host="evil.example")[0] == 403


def test_a_server_of_this_machine_has_no_token(start):
    """Its link is short."""
    client = start()
    assert client.server.link == f"http://127.0.0.1:{client.place[1]}/"
    assert client.server.server_address[0] == "127.0.0.1"


BAD = {
    "too long": (b"x" * (live.MOST_BYTES + 1), {}),
    "no length": (b"", {"Content_Length": "x"}),
    "negative": (b"", {"Content_Length": "-1"}),
    "no JSON": (b"{", {}),
    "a list": (b"[]", {}),
    "no seed": (b'{"words": "red"}', {}),
    "seed": (b'{"words": "red", "seed": -1}', {}),
    "seed is text": (b'{"words": "red", "seed": "1"}', {}),
    "words": (b'{"words": 3, "seed": 1}', {}),
    "more": (b'{"words": "red", "seed": 1, "path": "x"}', {}),
    "surrogate": (b'{"words": "\\ud800", "seed": 1}', {}),
}


@pytest.mark.parametrize("body, headers", BAD.values(), ids=BAD.keys())
def test_a_bad_request_is_answered_in_one_line(start, body, headers):
    """Status 400; the next one is carried out."""
    client = start()
    status, _, answer = client.request("POST", "/start", body, **headers)
    assert status == 400 and 0 < len(line := answer.read().decode()) < 300 and "\n" not in line
    client.start()


def test_an_unknown_word_is_named_and_the_stream_goes_on(start):
    """At the start, and as the next prompt."""
    client = start()
    unknown = "prompt: unknown word 'pink'; known: red green blue yellow, slow fast, wood metal"
    assert client.ask("start", words="pink", seed=0) == unknown
    client.start()
    client.watch_until(lambda news: len(client.known) > 2)
    assert client.ask("prompt", id=client.id, words="pink") == unknown
    news = client.watch_until(lambda news: len(client.known) > 5, played=3)
    assert not news["ended"] and {block["prompt"] for block in client.known} == {"red"}


# ---- the stream ----


def test_one_stream_at_a_time(start):
    """Others are told so, also if they know nothing of the first; after a stop there is a next."""
    client = start()
    client.start()
    other = client.ask("start", words="blue", seed=1)
    assert other == "another page plays a stream; stop it there, or close that page"
    assert client.ask("stop", id="other") == "this stream has ended; press start"
    assert not client.report()["ended"]
    first = client.id
    client.ask("stop", id=first)
    client.start("blue")
    assert client.ask("report", id=first, played=0, known=0) == "this stream has ended; press start"
    client.watch_until(lambda news: client.known)


def test_the_server_waits_for_its_viewer(start):
    """It makes AHEAD seconds and a block more than what is played, whatever the time."""
    client = start()
    client.start()
    for played in (0, 2, 2.5):
        due = played + live.AHEAD
        client.watch_until(lambda _: [b for b in client.known if b["interval"][1] > due], played)
        time.sleep(0.4)  # it would make several more blocks in this time
        client.report(played)
        assert client.known[-1]["interval"][1] <= due + 1


def test_a_stream_that_nobody_watches_ends(start, monkeypatch, tmp_path):
    """After some seconds without a report, with its film kept."""
    monkeypatch.setattr(live, "SILENCE", 0.5)
    client = start("--out", FILM)
    client.start()
    client.server.studio.session.thread.join(timeout=20)
    assert client.report()["ended"]
    frames = len([p for p in packets(FILM) if p[0] == "video"])
    assert frames % 24 == 1 and 1 <= frames <= 24 * (live.AHEAD + 1) + 1


def test_a_new_prompt_applies_from_the_next_block(start):
    """It is told with each block, and the film is that of generate.py with the same prompts."""
    client = start("--seconds", 8, "--out", FILM, "--seed", 3)
    client.start(seed=3)
    client.watch_until(lambda news: len(client.known) > live.AHEAD)
    client.ask("prompt", id=client.id, words="blue slow")
    client.watch_to_the_end()
    (second,) = {b["interval"][0] for b, a in zip(client.known[1:], client.known)
                 if b["prompt"] != a["prompt"]}  # fmt: skip
    assert live.AHEAD <= second <= live.AHEAD + 1
    source = client.server.studio.source
    cues = [generate.Cue(0, "red"), generate.Cue(second, "blue slow")]
    decoder = source.decoder(lambda _, f: f)
    movie = Movie("plain.mp4", (32, 32), 24, 24000, 1, 10)
    for block in generate.stream(source.net, cues, 8, seed=3):
        chunk = decoder.decode(block)
        movie.add(*to_planes(chunk.frames, halve=False), chunk.samples.numpy())
    movie.close()
    assert Path(FILM).read_bytes() == Path("plain.mp4").read_bytes()


def test_every_block_comes_with_its_cache_and_its_times(start):
    """Slots as in the table of a film; TTFC with the first second; times grow."""
    client = start("--window", 1, "--seconds", 5)
    client.start()
    news = client.watch_to_the_end()
    held = [block["held"] for block in client.known]
    assert held[:3] == [[0], [0, 1], [0, 1, 2]] and held[3:5] == [[0, 3, 2], [0, 3, 4]]
    assert [block["interval"] for block in client.known[:3]] == [[0, 0], [0, 1], [1, 2]]
    written = [block["written"] for block in client.known]
    assert written == sorted(written) and news["ttfc"] == written[1]
    assert all(0 < block["made"] < 5 for block in client.known)


def test_the_film_can_be_played_while_it_grows(start):
    """What was sent so far is a row of boxes that decodes; in the end it has the kept packets."""
    client = start("--seconds", 6, "--out", FILM)
    client.start()
    sent, film = b"", client.film()
    while boxes(sent)[0].count("mdat") < 4:
        sent += film.read1()
        client.report()
    whole = sent[: len(sent) - len(boxes(sent)[1])]
    kinds = boxes(whole)[0]
    assert kinds[:2] == ["ftyp", "moov"] and set(kinds[2::2]) == {"moof"}
    with av.open(io.BytesIO(whole)) as growing:
        assert sum(1 for _ in growing.decode(video=0)) >= 3 * 6
    assert not Path(FILM).exists()
    client.watch_to_the_end()
    sent += film.read()
    assert boxes(sent)[1] == b"" and packets(io.BytesIO(sent)) == packets(FILM)
    assert client.ask("film", id=client.id).startswith("this film is played already")


def test_only_what_is_named_is_kept(start, tmp_path, monkeypatch):
    """Without --out nothing is left, here or among temporary files; names count up."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "film-2.mp4").write_text("of somebody else")
    for options, kept in ([], []), (["--out", FILM], ["film-3.mp4", FILM]):
        client = start("--seconds", 2, *options)
        for _ in range(2):
            client.start()
            client.watch_to_the_end()
        left = {path.name for path in tmp_path.iterdir()}
        assert left == {*kept, "film-2.mp4"}
    assert (tmp_path / "film-2.mp4").read_text() == "of somebody else"


def test_an_error_of_a_stream_is_told_and_the_next_one_runs(start, monkeypatch):
    """In one line; the blocks before it are played."""
    client = start()
    decode = decoders.ToyDecoder.decode

    def broken(self, block):
        if block.index == 2:
            raise RuntimeError("no memory\nfor this")
        return decode(self, block)

    with monkeypatch.context() as patched:
        patched.setattr(decoders.ToyDecoder, "decode", broken)
        client.start()
        film = client.film()
        news = client.watch_to_the_end()
        assert news["error"] == "RuntimeError: no memory" and len(client.known) == 2
        assert b"mdat" in film.read()
    client.start()
    client.watch_until(lambda news: len(client.known) > 2)


# ---- the pictures of the passes ----


def strip_of(url):
    """A PNG's data URL -> the pictures of its passes (passes, 3, H, W)."""
    with av.open(io.BytesIO(b64decode(url.partition(",")[2]))) as file:
        (frame,) = file.decode(video=0)
    pixels = torch.from_numpy(frame.to_ndarray(format="rgb24")).permute(2, 0, 1) / 255
    return torch.stack(pixels.split(SMALL.width, 2))


def test_the_last_pass_is_the_finished_block(student):
    """One picture a pass, each another; the last one is the block's last frame, by the codec."""
    cfg, net = SMALL, toy_source.load_student(student, SMALL)
    pictures, strips, codec = PassPictures(net, 4), [], toy_codec.load(cfg)
    for block in pictures.of_blocks(generate.stream(net, "red", 3), strips):
        strip = strip_of(strips[-1])
        last = block.video[:, -cfg.tokens_per_frame :]
        clean = codec.decode_video(last, block.index == 0)[0, -1]
        assert len(strip) == 4 and (strip[3] - clean).abs().max() < 0.003
        assert all((one - clean).abs().mean() > 0.01 for one in strip[:3])
    assert len(strips) == 4


# ---- the command ----

CONTRADICTIONS = {
    "page": (["--live", "--html", "x.html"], "--live does not go together with --html"),
    "report": (["--live", "--report", "x.json"], "--live does not go together with --report"),
    "list": (["--live", "--prompts", "x.txt"], "--live does not go together with --prompts"),
    "host": (["--host", "0.0.0.0"], "--host needs --live"),
    "port": (["--port", "8000"], "--port needs --live"),
    "browser": (["--no-browser"], "--no-browser needs --live"),
    "film": (["--live", "--out", "x.txt"], "x.txt: expected a name that ends in .mp4"),
    "name": (["--live", "--host", "no.such.host.invalid"], "--host no.such.host.invalid --port 0:"),
}


@pytest.mark.parametrize("options, message", CONTRADICTIONS.values(), ids=CONTRADICTIONS.keys())
def test_options_that_contradict_are_refused(tmp_path, monkeypatch, capsys, options, message):
    """In one line, with no file left."""
    monkeypatch.chdir(tmp_path)
    status, out, err = run_here(generate, options, monkeypatch, capsys)
    assert status == 2 and message in err and err.count("\n") == 1 and not out
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_ends_the_server_and_keeps_the_film(tmp_path):
    """Two lines: the film, whole, and the end; status 0."""
    server = Process(tmp_path, "--out", "film.mp4")
    port = int(server.link.split(":")[2].strip("/"))
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.request("POST", "/start", json.dumps({"words": "red", "seed": 0}))
    assert "id" in json.loads(connection.getresponse().read())
    time.sleep(1)
    assert server.end() == (0, "wrote film.mp4\nended\n")
    assert [path.name for path in tmp_path.iterdir()] == ["film.mp4"]
    assert len([p for p in packets(str(tmp_path / "film.mp4")) if p[0] == "video"]) >= 25


# ---- in a browser ----

in_browser = pytest.mark.skipif(not CHROMIUM, reason="no chromium here")

PRESS = "get('send').click()"
# Mean red, green and blue of the picture that is shown.
COLOUR = """(() => {
  const pen = new OffscreenCanvas(1, 1).getContext("2d");
  pen.drawImage(film, 0, 0, 1, 1);
  return [...pen.getImageData(0, 0, 1, 1).data];
})()"""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The command itself, with the toy's student; it keeps film.mp4, film-2.mp4, ..."""
    folder = tmp_path_factory.mktemp("server")
    server = Process(folder, "--out", "film.mp4")
    server.folder = folder
    yield server
    server.end()


def type_prompt(tab, words):
    tab.run(f"get('words').value = {json.dumps(words)}")
    tab.run(PRESS)


def play(tab, seconds):
    """Press start, play, and check that the film never stood still."""
    tab.run(CLOCK)
    tab.run(PRESS)
    tab.wait(f"film.currentTime > {seconds}", seconds=seconds + 20)
    ticks = [tick for tick in tab.run("ticks") if tick[1] > 0]
    assert longest_gap(ticks) <= 0.1
    assert tab.run("get('dry').textContent") == "never"
    assert tab.run("film.webkitAudioDecodedByteCount") > 1000 * seconds
    return ticks


@in_browser
def test_a_browser_plays_a_stream_obeys_a_prompt_and_stops(server):
    """Six seconds without a gap, then another colour; the film that is left is what was played."""
    with opened(server.link) as tab:
        play(tab, 6)
        red, _, blue, _ = tab.run(COLOUR)
        assert red > blue + 4
        type_prompt(tab, "blue")
        tab.wait("data.prompts.length == 2")
        assert tab.wait("document.querySelector('td.prompt')?.textContent") == "blue"
        tab.wait(f"(([r, g, b]) => b > r + 4)({COLOUR})")
        tab.run("get('stop').click()")
        tab.wait("film.paused && get('send').textContent == 'start'")
        played = tab.run("film.currentTime")
        assert tab.run("get('error').textContent") == ""
    assert server.process.stdout.readline() == "wrote film.mp4\n"
    frames = [p for p in packets(str(server.folder / "film.mp4")) if p[0] == "video"]
    assert len(frames) > 24 * played and len(frames) % 24 == 1


@in_browser
def test_a_reload_ends_the_stream_and_plays_another(server):
    """At once: the page says that it goes."""
    with opened(server.link) as tab:
        for _ in range(2):
            tab.run(PRESS)
            tab.wait("film.currentTime > 0.3")
            tab.run("window.old = true")
            tab.send("Page.reload")
            tab.wait("!window.old && document.readyState == 'complete'")
            assert tab.run("get('send').textContent") == "start"
        assert tab.run("get('error').textContent") == ""


@in_browser
def test_a_page_of_another_origin_gets_nothing(server):
    """Neither to read nor to embed; and it starts nothing."""
    with opened("data:text/html,<title>foreign</title>") as tab:
        for how in ("{}", "{mode: 'no-cors'}"):
            fetched = f"fetch('{server.link}', {how}).then(() => 'something', () => 'nothing')"
            assert tab.run(fetched) == "nothing"
        how = """{method: 'POST', mode: 'no-cors', body: '{"words": "red", "seed": 0}'}"""
        tab.run(f"fetch('{server.link}start', {how}).catch(() => 0)")
        tab.run("window.film = document.createElement('video')")
        tab.run(f"film.src = '{server.link}film'")
        tab.wait("film.error?.code > 0")
    with opened(server.link) as tab:  # the server is free
        tab.run(PRESS)
        tab.wait("film.currentTime > 0")


@in_browser
def test_an_error_is_shown_on_the_page(server):
    """One line; start can be pressed again."""
    with opened(server.link) as tab:
        type_prompt(tab, "pink")
        assert tab.wait("get('error').textContent").startswith("prompt: unknown word 'pink'; known")
        assert tab.run("get('send').textContent") == "start"
        type_prompt(tab, "red")
        tab.wait("film.currentTime > 0.3")
        assert tab.run("get('error').textContent") == ""


@in_browser
@pytest.mark.parametrize("width", [360, 1100])
def test_nothing_is_wider_than_the_page(server, width):
    """On a telephone, too."""
    with opened(server.link) as tab:
        size = dict(width=width, height=800, deviceScaleFactor=1, mobile=width < 500)
        tab.send("Emulation.setDeviceMetricsOverride", **size)
        tab.run(PRESS)
        tab.wait("data.blocks.length > 3")
        assert tab.run("document.documentElement.scrollWidth") <= width


# Notes [time of the film, its loudness] and [time of the film, time of its picture].
SENSES = """
[window.heard, window.seen] = [[], []];
const context = new AudioContext(), ear = new AnalyserNode(context, {fftSize: 512});
context.createMediaElementSource(film).connect(ear).connect(context.destination);
const wave = new Float32Array(512);
setInterval(() => {
  ear.getFloatTimeDomainData(wave);
  heard.push([film.currentTime, Math.hypot(...wave)]);
}, 5);
const see = (_, picture) => {
  seen.push([film.currentTime, picture.mediaTime]);
  film.requestVideoFrameCallback(see);
};
film.requestVideoFrameCallback(see);
"""


@in_browser
@pytest.mark.slow
def test_picture_and_sound_are_in_sync(server):
    """What is seen and heard belongs to the time that plays, by the film that is kept."""
    with opened(server.link) as tab:
        tab.run(SENSES)
        tab.run(PRESS)
        tab.wait("film.currentTime > 12", 40)
        heard, seen = torch.tensor(tab.run("heard")), torch.tensor(tab.run("seen"))
        tab.run("get('stop').click()")
    name = server.process.stdout.readline().split()[1]
    with av.open(str(server.folder / name)) as film:
        sound = torch.cat([torch.from_numpy(f.to_ndarray()[0]) for f in film.decode(audio=0)])
    energy = torch.cat([torch.zeros(1), sound.double().square().cumsum(0)])
    heard = heard[(heard[:, 0] > 0.5) & (heard[:, 0] < 12)]

    def agreement(lag):  # of the loudness that was heard with the film's, `lag` seconds later
        at = ((heard[:, 0] + lag) * 24000).long()
        loudness = (energy[at] - energy[at - 256]).sqrt()
        return torch.corrcoef(torch.stack([loudness, heard[:, 1].double()]))[0, 1]

    lags = [n / 100 for n in range(-20, 21)]
    assert max(map(agreement, lags)) > 0.9
    assert abs(max(lags, key=agreement)) <= 0.04
    assert abs((seen[:, 0] - seen[:, 1]).median()) <= 0.04


@in_browser
@pytest.mark.slow
def test_a_minute_is_played_without_a_gap(server):
    """Sound and picture, never dry."""
    with opened(server.link) as tab:
        ticks = play(tab, 60)
        assert ticks[-1][1] > 60
