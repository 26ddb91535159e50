"""Parts of all command lines: errors in one line with exit status 2, help, common options."""

import argparse
import contextlib
import os
import re
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
    sys.stdout, sys.stderr = outputs = _Output(sys.stdout), _Output(sys.stderr)
    try:
        yield
    except (ValueError, OSError) as error:
        message = " ".join(str(error).split())  # messages of libraries may have several lines
        message = f"{message[:500]} ..." if len(message) > 600 else message  # it may quote a prompt
        print(f"{shown(sys.argv[0])}: {message}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)  # 128 + SIGINT, as a shell reports it
    finally:
        sys.stdout, sys.stderr = (output.stream for output in outputs)


class _Output:
    """Standard output or error; may be closed, because the terminal or a pipe's reader is gone.

    A program that writes a film or weights goes on without it.
    """

    def __init__(self, stream):
        # None: it was closed from the start
        self.stream = stream or open(os.devnull, "w", encoding="utf-8")
        if hasattr(stream, "reconfigure"):  # print what a terminal cannot show as \u1234
            stream.reconfigure(errors="backslashreplace")

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        return self._tried(self.stream.write, text)

    def flush(self):
        self._tried(self.stream.flush)

    def _tried(self, method, *args):
        try:
            return method(*args)
        except OSError:
            # Buffered text goes nowhere. Otherwise Python would report the error again at its end.
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action):
        # argparse would print "(default: None)" for an option without a default
        return action.help if action.default is None else super()._get_help_string(action)


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        # argparse writes "argument --steps: 0: expected ..."; our other messages begin with --steps
        message, is_ours = re.subn(r"^argument (\S+): (?=.*: expected)", r"\1 ", message)
        message = " ".join(message.split())  # it may quote an argument of several lines
        self.exit(2, f"{self.prog}: {message}{'' if is_ours else '; see --help'}\n")

    def parse_args(self, *args):
        found = super().parse_args(*args)
        for action in self._actions:
            value = getattr(found, action.dest, None)
            # An unset variable of the shell gives "", which as a path means the current folder.
            if value != action.default and "" in (value if isinstance(value, list) else [value]):
                self.error(f"{'/'.join(action.option_strings) or action.dest} is empty")
        return found


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


# ---- numbers: every option has bounds, so that no value takes for ever ----


def whole(low, high):
    """Return an argparse type: a whole number from `low` to `high`.

    >>> whole(1, 9)("5")
    5
    >>> whole(1, 9)("1e99")
    Traceback (most recent call last):
    argparse.ArgumentTypeError: 1e99: expected a whole number from 1 to 9
    """
    return _number(int, low, high, f"a whole number from {low} to {high}")


def real(low, high):
    """Return an argparse type: a number from `low` to `high`.

    >>> real(0, 100)("nan")
    Traceback (most recent call last):
    argparse.ArgumentTypeError: nan: expected a number from 0 to 100
    """
    return _number(float, low, high, f"a number from {low:g} to {high:g}")


def _number(kind, low, high, expected):
    def parse(text):
        with contextlib.suppress(ValueError):
            if low <= (value := kind(text)) <= high:  # False for nan
                return value
        raise argparse.ArgumentTypeError(f"{shlex.quote(text)}: expected {expected}")

    return parse


def add_pair(parser, name, default, about, kind):
    names = "VIDEO", "AUDIO"
    parser.add_argument(name, nargs=2, type=kind, default=default, metavar=names, help=about)


def add_guidance(parser, default, about):
    add_pair(parser, "--guidance", default, f"{about}; 1: no guidance", real(0, 100))


def add_seed(parser, about, high=2**32 - 1):
    # Trap: a CPU generator uses only the lowest 32 bits, so a larger seed would repeat another one.
    about = f"{about}, 0 to {high}"
    parser.add_argument("--seed", type=whole(0, high), default=0, help=about)


# ---- the rest ----


def weights_path(path) -> str:
    """Return the path of a weight file: from this folder, or else from the project's folder."""
    # Shipped weights, which are the defaults of many options, are found from any folder.
    here, ours = Path(path), ROOT / path
    return str(ours) if ours.exists() and not here.exists() else path


def add_weights(parser, option, default, about, nargs=None):
    if nargs:  # argparse applies a type to a default only if it is a single string
        default = [weights_path(path) for path in default]
    parser.add_argument(option, nargs=nargs, type=weights_path, default=default, help=about)


def options(args, leave_out=()) -> dict:
    """Return the values of all options that have one: {"--steps": 5, ...}."""
    values = {n: x for n, x in vars(args).items() if n not in leave_out and x is not None}
    return {f"--{name.replace('_', '-')}": value for name, value in values.items()}


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
    for name, value in options(args, leave_out).items():
        words += [name, *map(str, value if isinstance(value, (list, tuple)) else [value])]
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
