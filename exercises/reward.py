"""A film by a student's own answers, compared with the film by right code: the reward."""

import contextlib
import io
import multiprocessing
import sys
import tempfile
import traceback
from pathlib import Path

import av

from exercises import behind, coursework

# Long enough for a second prompt, and for blocks to leave the cache.
OPTIONS = "--seconds", "6", "--window", "2", "--seed", "1"
PROMPTS = "red fast metal", "3: blue slow wood"


def answered() -> dict[str, Path]:
    """Return the files of the started exercises that play a part in a stream: {name: file}."""
    names = list(coursework.EXERCISES)
    streaming = names[: names.index("generate") + 1]
    files = {name: coursework.ANSWERS / f"{name}.py" for name in streaming}
    return {name: file for name, file in files.items() if file.exists()}


def make_film(answers, path, is_silent=False):
    """Stream a film with answers, {module: file}, in the places of modules."""
    behind.stand_behind(answers)
    sys.argv = ["generate.py", *OPTIONS, "--out", str(path)]
    sys.argv += [word for prompt in PROMPTS for word in ("--prompt", prompt)]
    out, err = (io.StringIO(), io.StringIO()) if is_silent else (sys.stdout, sys.stderr)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            import generate  # here, because it shall find the answers

            generate.main()
    except Exception as error:
        is_unwritten = "is not written yet" in str(error)
        sys.exit(str(error) if is_unwritten else traceback.format_exc())


def films(ours, right, answers):
    """Make the film by the answers and the film by right code, in processes of their own."""
    context = multiprocessing.get_context("spawn")
    orders = (answers, ours, False), ({}, right, True)
    processes = [context.Process(target=make_film, args=order) for order in orders]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        raise ValueError("--film: your answers made no film; the reason is above")


def packets(path) -> dict[str, list[tuple[float, bytes]]]:
    """Return the time and the bytes of all packets: {"video": [...], "audio": [...]}."""
    found = {"video": [], "audio": []}
    with av.open(str(path)) as movie:
        for packet in movie.demux():
            if packet.size:
                time = float(packet.pts * packet.time_base)
                found[packet.stream.type].append((time, bytes(packet)))
    return found


def difference(ours, right) -> dict[str, float]:
    """Return the second from which two films differ, for each stream that differs.

    >>> difference({"video": [(0, b"a"), (1, b"b")]}, {"video": [(0, b"a"), (1, b"c"), (2, b"d")]})
    {'video': 1}
    """
    found = {}
    for stream, packets in right.items():
        pairs = zip(packets, ours[stream])
        times = [time for (time, data), (_, other) in pairs if data != other]
        if len(packets) != len(ours[stream]):
            times.append(packets[-1][0])
        if times:
            found[stream] = min(times)
    return found


def report() -> str:
    """Make a film by the answers and one by right code, and say whether they are the same."""
    if not (files := answered()):
        raise ValueError("--film: no answers yet; start with python -m exercises masks")
    answers = {coursework.find(name).module: file for name, file in files.items()}
    with tempfile.TemporaryDirectory() as folder:
        ours, right = coursework.ANSWERS / "film.mp4", Path(folder, "right.mp4")
        films(ours, right, answers)
        found = difference(packets(ours), packets(right))
    told = [f"made by your {', '.join(files)}"]
    told += [f"its {stream} differs from second {time:g} on" for stream, time in found.items()]
    if not found:
        told.append("every byte of picture and sound is right")
    return "\n".join(told)
