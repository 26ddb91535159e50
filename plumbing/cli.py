"""Parts of all command lines: errors in one line with exit status 2, help, common options."""

import argparse
import contextlib
import shlex
import sys
import time
from pathlib import Path

import torch

import config

ROOT = Path(__file__).resolve().parent.parent  # of the project


@contextlib.contextmanager
def one_line_errors():
    """Turn bad input into one line on stderr and exit status 2, instead of a traceback."""
    try:
        yield
    except (ValueError, OSError) as error:
        message = " ".join(str(error).split())  # messages of libraries may have several lines
        print(f"{shown(sys.argv[0])}: {message}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)  # 128 + SIGINT, as a shell reports it


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action):
        # argparse would print "(default: None)" for an option without a default
        return action.help if action.default is None else super()._get_help_string(action)


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: {message}; see --help\n")


def parser(doc):
    """Return an ArgumentParser whose help is `doc` and shows every default."""
    return _Parser(prog=shown(sys.argv[0]), description=doc, formatter_class=_Help)


def shown(path) -> str:
    """Shorten a path for messages: relative to the project; outside of it, the name of the file.

    >>> shown(ROOT / "dmd.py"), shown(ROOT / "toy" / "codec.py"), shown("/elsewhere/x.py")
    ('dmd.py', 'toy/codec.py', 'x.py')
    """
    path = Path(path).resolve()
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name


def add_pair(parser, name, default, about):
    names = "VIDEO", "AUDIO"
    parser.add_argument(name, nargs=2, type=float, default=default, metavar=names, help=about)


def add_guidance(parser, default, about):
    add_pair(parser, "--guidance", default, f"{about}; 1: no guidance")


def command(parser, args, leave_out=("run", "out")) -> str:
    """Return the command line that these arguments came from, to be stored with results.

    >>> p = argparse.ArgumentParser(prog="teacher.py")
    >>> _ = p.add_argument("--steps", type=int), p.add_argument("--init"), p.add_argument("--out")
    >>> command(p, p.parse_args(["--steps", "5", "--out", "x"]))
    'python teacher.py --steps 5'
    """
    room, _, name = parser.prog.rpartition("/")
    words = ["python", "-m", f"{room}.{Path(name).stem}"] if room else ["python", name]
    # Leave out options that change no number, such as the place to write to.
    for name, value in vars(args).items():
        if name not in leave_out and value is not None:
            values = value if isinstance(value, (list, tuple)) else [value]
            words += [f"--{name.replace('_', '-')}", *map(str, values)]
    return shlex.join(words)


def find_device(name) -> torch.device:
    """Return a torch device.  Raises ValueError if it is unknown or not usable here."""
    try:
        torch.empty(0, device=name).cpu()  # "meta" exists, but no data can be read from it
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).splitlines()[0].split(". ")[0]  # torch's message is a paragraph
        raise ValueError(f"--device {name}: not usable here ({reason}); try --device cpu") from None
    return torch.device(name)


def chosen(only, known) -> list:
    """Return the names that --only asks for; without --only, all known names.

    >>> chosen(["b"], {"a": 1, "b": 2}), chosen(None, {"a": 1, "b": 2})
    (['b'], ['a', 'b'])
    >>> chosen(["c"], ["a", "b, long"])
    Traceback (most recent call last):
    ValueError: --only c: expected some of a 'b, long'
    """
    if unknown := set(only or ()) - set(known):
        # Names may contain spaces and commas. Quote them, so that they can be copied.
        names = shlex.join(known)
        raise ValueError(f"--only {shlex.quote(unknown.pop())}: expected some of {names}")
    return list(only or known)


def machine(device) -> dict:
    """Return device, versions and date, to be stored with every measurement."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "date": time.strftime("%Y-%m-%d"),
    }


def find_config(name) -> config.Config:
    """Return the config of that name.  Raises ValueError, listing the known names."""
    if name not in config.CONFIGS:
        raise ValueError(f"--config {name}: unknown; expected one of {', '.join(config.CONFIGS)}")
    return config.CONFIGS[name]
