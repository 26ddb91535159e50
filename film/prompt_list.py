"""Many films from one list of prompts: `python generate.py --prompts FILE --out-dir DIR`.

A list in plain text has one prompt a line. A list of JSON lines has one object a line:

    {"id": "rain", "prompt": "Rain falls on a lake.", "seed": 3, "seconds": 10, "image": "lake.png"}

Only "prompt" is needed; a list of texts is like several --prompt. The default id is the number of
the line (00007), other defaults are those of the command line. An image is looked for from the
folder of the list. The films are DIR/ID.mp4, with DIR/ID.png and the report DIR/ID.json.

An error in the list itself ends the run before anything is loaded. A film that cannot be made does
not: the others are made, and it is named at the end. A film that is whole, and whose report tells
of the same request, is not made again; if its report tells of another request, the run ends.
"""

import argparse
import json
import re
import sys
import unicodedata
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from film.filming import in_one_line, sheet_of
from film.mp4 import check_film
from plumbing import files, texts

KEYS = "id", "prompt", "seed", "seconds", "image"
ID = re.compile(r"\w(?:[\w.-]{0,98}\w)?")  # no separator, no leading dot or hyphen, no final dot
RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.I)  # devices on Windows
MOST_SEED = 2**32 - 1
CONTRADICT = "prompt", "out", "html", "report", "host", "port", "no_browser"


class Entry(NamedTuple):
    """One film of a list."""

    line: int
    id: str
    prompt: list[str]  # as several --prompt
    seed: int | None = None  # None, in each field: as the command line says
    seconds: float | None = None
    image: str | None = None


# ---- the list ----


def read_list(path) -> list[Entry]:
    """Read and check a list.  Raises ValueError, naming file and line."""
    # Trap: str.splitlines would also split at a form feed or U+2028, which a prompt may hold.
    lines = re.split(r"\r\n|\r|\n", texts.read_text(path))
    lines = [(n, text) for n, line in enumerate(lines, 1) if (text := line.strip("\ufeff \t"))]
    if not lines:
        raise ValueError(f"{path}: no prompts; expected one a line, or JSON lines")
    read = read_object if lines[0][1].startswith("{") else read_prompt
    entries, seen = [], {}
    for number, text in lines:
        try:
            entry = read(number, text, Path(path).parent)
            check_id(entry.id, seen, number)
        except ValueError as error:
            raise ValueError(f"{path}: line {number}: {error}") from None
        entries.append(entry)
    return entries


def read_prompt(number, text, folder) -> Entry:
    """Read a line of plain text.  Raises ValueError for JSON."""
    if text.startswith(('{"', "[{")):
        raise ValueError("JSON in a list of plain prompts; expected an object in every line")
    return Entry(number, f"{number:05}", [text])


def read_object(number, text, folder) -> Entry:
    """Read a JSON line."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON ({error})") from None
    if not isinstance(found, dict):
        raise ValueError("expected a JSON object in every line, as in the first")
    if odd := found.keys() - set(KEYS):
        raise ValueError(f"unknown key {min(odd)!r}; expected {', '.join(KEYS)}")
    found = {key: value for key, value in found.items() if value is not None}
    name, prompt = found.get("id", f"{number:05}"), found.get("prompt")
    prompt = [prompt] if isinstance(prompt, str) else prompt
    if not prompt or not isinstance(prompt, list) or not all(isinstance(x, str) for x in prompt):
        raise ValueError('"prompt" must be a text, or a list of texts')
    seed, seconds, image = (found.get(key) for key in KEYS[2:])
    if seed is not None and (type(seed) is not int or not 0 <= seed <= MOST_SEED):
        raise ValueError(f'"seed" {seed!r}: expected a whole number from 0 to {MOST_SEED}')
    if seconds is not None and type(seconds) not in (int, float):
        raise ValueError(f'"seconds" {seconds!r}: expected a number')
    if image is not None and not isinstance(image, str):
        raise ValueError(f'"image" {image!r}: expected the name of a file')
    if type(name) not in (str, int):
        raise ValueError(f'"id" {name!r}: expected a text or a whole number')
    image = image and str(folder / image)
    name = unicodedata.normalize("NFC", str(name))  # there are two ways to write é
    return Entry(number, name, prompt, seed, seconds, image)


def check_id(name, seen, number):
    """Raise ValueError for an id that is no safe file name, or is in `seen`; add it there."""
    if not ID.fullmatch(name) or RESERVED.fullmatch(name):
        raise ValueError(
            f"id {name!r}: no safe file name; expected letters, digits, and _ - . inside, "
            f"at most 100, and no name that Windows reserves"
        )
    if (same := name.casefold()) in seen:  # some systems take Rain and rain for one name
        raise ValueError(f"id {name!r} is also that of line {seen[same]}")
    seen[same] = number


# ---- the films ----


class FilmList:
    """The films of a list: requests for those that are still to be made, and what fails."""

    def __init__(self, args, check_args):
        """Check the command line and the list.  Raises ValueError.

        check_args(args)   makes a `generate.Request`, or raises ValueError: this film fails
        """
        check_options(args)
        entries, folder = read_list(args.prompts), Path(args.out_dir)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            reason = files.reason_of(error)
            raise ValueError(f"--out-dir {folder}: no folder can be made ({reason})") from None
        check_film(folder / "x.mp4")  # here, and not for each film: it lists the folder
        self.num_films, self.requests, self.failed = len(entries), [], {}
        for entry in entries:
            own = {key: value for key, value in entry._asdict().items() if value is not None}
            own["out"], own["report"] = (str(folder / entry.id) + s for s in (".mp4", ".json"))
            try:
                request = check_args(argparse.Namespace(**{**vars(args), **own}))
            except (ValueError, OSError) as error:
                self.note(own["out"], f"{args.prompts}: line {entry.line}: {in_one_line(error)}")
            else:
                self.requests += [] if is_made(request) else [request]
        if made := self.num_films - len(self.requests) - len(self.failed):
            print(f"{made} of {self.num_films} films are there already")

    def note(self, film, reason):
        """Note that a film was not made, or not whole, and why: a text or an error."""
        reason = reason if isinstance(reason, str) else in_one_line(reason)
        # the error itself would keep all that its functions held, on a GPU the caches
        self.failed[film] = f"{Path(film).stem}: {reason}"
        tqdm.write(self.failed[film], file=sys.stderr)

    def end(self):
        """Report all failures.  Raises ValueError unless every film is there."""
        left = [r for r in self.requests if r.out not in self.failed and not is_made(r)]
        for line in self.failed.values():
            print(f"failed: {line}", file=sys.stderr)
        if self.failed or left:
            counts = f"{len(self.failed)} of {self.num_films} films failed, {len(left)} are left"
            first = "correct what failed; then " if self.failed else ""
            raise ValueError(f"{counts}; {first}the same command goes on")


def check_options(args):
    """Raise ValueError for options that contradict --prompts."""
    if not args.out_dir:
        raise ValueError("--prompts needs --out-dir: the folder for the films")
    for name in CONTRADICT:
        if vars(args).get(name):
            option = name.replace("_", "-")
            raise ValueError(f"--{option} does not go together with --prompts; leave one out")


def is_made(request) -> bool:
    """Is the film there, whole, and made on the same request?  Raises ValueError for another."""
    if not Path(request.report).exists():
        return False
    report = texts.read_json(request.report)
    for key, now in json.loads(json.dumps(request.asked())).items():  # JSON has no tuples
        if (before := report.get(key)) != now:
            raise ValueError(
                f"{request.report}: tells of another request: {key} {before!r}, now {now!r}; "
                f"delete it to make this film anew, or name another --out-dir"
            )
    frames = 1 + round(request.seconds * request.cfg.fps)
    made = Path(request.out), sheet_of(request.out)
    are_there = all(path.exists() and path.stat().st_size for path in made)
    return are_there and report.get("frames") == frames
