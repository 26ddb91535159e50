"""From the blocks of a stream to its film, contact sheet, page and report, however it ends.

    blocks --decode--> packets --thread of film/writer.py--> out.mp4, out.png, page, report

After an error or a signal, the later steps still run: the film of the finished blocks is kept.
"""

import contextlib
import signal
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from film.mp4 import Movie, check_film, partial_films
from film.writer import Writer, packet
from masks import block_interval
from plumbing import files

NAMES = "SIGINT", "SIGTERM", "SIGHUP"  # Ctrl-C, kill, a closed terminal (Windows has no SIGHUP)


class StopRequest:
    """Note signals inside `with`; any number of them is one request.

    is_asked        whether a signal has come
    may_interrupt   set it where the first signal may raise KeyboardInterrupt, once
    """

    is_asked = may_interrupt = False

    def __enter__(self):
        kinds = [getattr(signal, name) for name in NAMES if hasattr(signal, name)]
        # An ignored signal stays ignored: nohup asks for that.
        kinds = [kind for kind in kinds if signal.getsignal(kind) != signal.SIG_IGN]
        self.before = {kind: signal.signal(kind, self._ask) for kind in kinds}
        return self

    def __exit__(self, *_):
        for kind, handler in self.before.items():
            signal.signal(kind, handler)

    def _ask(self, *_):
        self.is_asked = True
        if self.may_interrupt:
            self.may_interrupt = False
            raise KeyboardInterrupt


def open_movie(path, decoder, watch) -> Movie:
    """Open the film that a decoder fills; watch: `Stopwatch` of its stream."""
    cfg, rate = decoder.cfg, decoder.sample_rate
    size = cfg.height, cfg.width
    movie = Movie(path, size, cfg.fps, rate, decoder.channels, decoder.scale)
    movie.add = watch.watch("write", movie.add, by_cpu=True)
    return movie


def run(blocks, decoder, movie, watch, seconds, stop=None):
    """Make a film of the blocks; return its small pictures, and the errors that ended it.

    seconds   of the whole film, to show the progress; None: show nothing

    After an error, the later steps still run: they write the finished blocks.
    """
    writer, errors, stop = Writer(movie, watch), [], stop or StopRequest()
    how = {"bar_format": "video {n:.0f}/{total:.0f} s {bar}", "disable": seconds is None}
    with noted(errors), tqdm(total=seconds, **how) as bar:
        try:
            stop.may_interrupt = True  # during the passes: an unfinished block may be lost
            for block in blocks:
                stop.may_interrupt = False
                watch.block_made()
                chunk = decoder.decode(block)
                latents = {"video latents": block.video, "audio latents": block.audio}
                writer.add(packet(f"block {block.index}", chunk, decoder.scale, latents))
                watch.block_decoded()
                low, high = block_interval(block.index, decoder.cfg)
                bar.update(high - low)
                if not bar.disable:
                    bar.write(progress_line(block.index, low, high, watch), file=sys.stdout)
                if stop.is_asked:
                    break
                stop.may_interrupt = True
        finally:  # also after an error: the film is not to be interrupted
            stop.may_interrupt = False
    with noted(errors):
        writer.add(packet("the end", decoder.finish(), decoder.scale))
    with noted(errors):
        writer.close()
    with noted(errors):
        movie.close()
    return writer.pictures, errors


@contextlib.contextmanager
def noted(errors):
    """Put an error into the list instead of raising it."""
    try:
        yield
    except KeyboardInterrupt:  # somebody asked for the end: no error
        pass
    except Exception as error:  # also of libraries, also a lack of memory
        errors.append(error)


def progress_line(index, low, high, watch):
    """The times of a block, on one line."""
    times = f"passes {1000 * watch.passes[-1]:5.0f} ms   decode {1000 * watch.decoding[-1]:4.0f} ms"
    more = watch.more_passes[index]
    new = f"   {more} passes more: new prompt" if more else ""
    return f"block {index:3}  {low:4g} - {high:<4g} s   {times}{new}"


def sheet_of(film) -> Path:
    """Path of a film's contact sheet."""
    return Path(film).with_suffix(".png")


def check_not_read(film, report, *inputs):
    """Raise ValueError if a film, its sheet or its report would overwrite a file that is read."""
    read = [Path(path).resolve() for path in inputs if path]
    for path in (film, sheet_of(film), report):
        if path and Path(path).resolve() in read:
            raise ValueError(
                f"{path} would be overwritten, but is read; give the film another name"
            )


def check_targets(film, page, report):
    """Raise ValueError for a file that cannot be written, or has a wrong ending."""
    check_film(film)
    for other in partial_films(film):
        print(f"{other} is there: another run still writes it, or was killed", file=sys.stderr)
    files.check_writable(sheet_of(film))
    if page:
        files.check_writable(page, suffix=".html")
    if report:
        files.check_writable(report, suffix=".json")


def save_pictures(request, pictures, movie, strips):
    """Write contact sheet and page."""
    from film import sheet  # it loads matplotlib, which takes half a second

    title = ", then ".join(cue.prompt for cue in request.cues)
    pictures, levels = map(torch.cat, zip(*pictures))
    sheet.save(sheet.draw_clip(pictures, levels, title, request.cfg), sheet_of(movie.path))
    if request.html:
        from film import page

        seconds = (movie.frames - 1) / request.cfg.fps
        contents = page.contents(pictures, levels, request, seconds, strips)
        page.write(request.html, movie.path, title, contents)


def finish(request, stop, pictures, errors, watch, movie, text_seconds, strips=()):
    """Write pictures and report; print what was made.  Raises the first error.

    strips   pictures of the passes of each block, see film/passes.py
    """
    if movie.frames:
        report = {**request.about(), **watch.report(movie.frames, request.cfg)}
        report |= {"text_seconds": text_seconds, "ended_by": [*map(in_one_line, errors)]}
        report["ended_by"] += ["interrupted"] * stop.is_asked
        if watch.ttfc:
            report["ttfc_with_text_seconds"] = watch.ttfc + text_seconds
        with noted(errors):
            save_pictures(request, pictures, movie, strips)
        with noted(errors):
            if request.report:
                files.write_json(request.report, report)
    elif not errors:
        errors.append(ValueError("interrupted before the first block was finished"))
    if errors:
        kept = f"{movie.frames} frames are kept in {movie.path}"
        kept = kept if movie.frames else "nothing was written"
        raise ValueError(f"{in_one_line(errors[0])}; {kept}") from errors[0]
    if stop.is_asked:
        print(f"interrupted: {movie.frames} frames are kept in {movie.path}", file=sys.stderr)
    print(summary(report, request.cfg.fps))
    written = [movie.path, sheet_of(movie.path), *filter(None, (request.html, request.report))]
    print(f"wrote {' and '.join(map(str, written))}")


def in_one_line(error) -> str:
    """The first line of an error, with its type where the message alone says too little."""
    first = "".join(str(error).splitlines()[:1])
    return first if isinstance(error, ValueError) else f"{type(error).__name__}: {first}"


def summary(report, fps) -> str:
    """The rates, on one line."""
    ttfc = f"{report['ttfc_seconds']:.2f} s" if report["ttfc_seconds"] else "-"
    passes, both = report["settled_passes_fps"], report["settled_end_to_end_fps"]
    return (
        f"{report['frames']} frames: TTFC {ttfc}, passes {passes:.0f} FPS = {passes / fps:.1f}x "
        f"real time, end to end {both:.0f} FPS = {both / fps:.1f}x, "
        f"peak memory {report['peak_memory_mb']:.0f} MB"
    )
