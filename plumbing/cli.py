"""What the command lines share: one-line errors with exit status 2, and a help that teaches."""

import argparse
import shlex
import sys
import time
from pathlib import Path

import torch

import config


def run(main):
    """Call main(); bad input becomes one line on stderr and exit status 2, not a traceback."""
    try:
        main()
    except (ValueError, OSError) as error:
        message = " ".join(str(error).split())
        print(f"{sys.argv[0]}: {message}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action):  # "(default: None)" would teach nothing
        return action.help if action.default is None else super()._get_help_string(action)


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: {message}; see --help\n")


def parser(doc):
    """An ArgumentParser whose help is the module's docstring and shows every default."""
    return _Parser(description=doc, formatter_class=_Help)


def add_pair(parser, name, default, about):
    """An option of two numbers: --NAME VIDEO AUDIO."""
    names = "VIDEO", "AUDIO"
    parser.add_argument(name, nargs=2, type=float, default=default, metavar=names, help=about)


def add_guidance(parser, default, of_what):
    """--guidance VIDEO AUDIO."""
    add_pair(parser, "--guidance", default, f"{of_what}; 1 is none")


def command(parser, args, leave_out=("run", "out")) -> str:
    """The line that repeats these arguments, for the record; paths of results left out.

    >>> p = argparse.ArgumentParser(prog="teacher.py")
    >>> _ = p.add_argument("--steps", type=int), p.add_argument("--init"), p.add_argument("--out")
    >>> command(p, p.parse_args(["--steps", "5", "--out", "x"]))
    'python teacher.py --steps 5'
    """
    words = ["python", Path(parser.prog).name]
    for name, value in vars(args).items():
        if name not in leave_out and value is not None:
            values = value if isinstance(value, (list, tuple)) else [value]
            words += [f"--{name.replace('_', '-')}", *map(str, values)]
    return shlex.join(words)


def find_device(name) -> torch.device:
    """A usable torch device.  Raises ValueError if it is unknown or not there."""
    try:
        torch.empty(0, device=name).cpu()  # "meta" exists, but nothing comes back from it
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).splitlines()[0].split(". ")[0]  # torch goes on for a paragraph
        raise ValueError(f"--device {name}: not usable here ({reason}); try --device cpu") from None
    return torch.device(name)


def chosen(only, known) -> list:
    """The known names that --only asks for, or all if it does not.

    Raises ValueError for one that is unknown.

    >>> chosen(["b"], {"a": 1, "b": 2}), chosen(None, {"a": 1, "b": 2})
    (['b'], ['a', 'b'])
    >>> chosen(["c"], ["a", "b, long"])
    Traceback (most recent call last):
    ValueError: --only c: expected some of a 'b, long'
    """
    if unknown := set(only or ()) - set(known):
        names = shlex.join(known)  # which may hold spaces and commas
        raise ValueError(f"--only {shlex.quote(unknown.pop())}: expected some of {names}")
    return list(only or known)


def machine(device) -> dict:
    """Where, with what and when: what a measurement must say besides its numbers."""
    is_gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if is_gpu else device.type,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "date": time.strftime("%Y-%m-%d"),
    }


def find_config(name) -> config.Config:
    """The config of that name.  Raises ValueError, listing the known ones."""
    if name not in config.CONFIGS:
        raise ValueError(f"--config {name}: unknown; expected one of {', '.join(config.CONFIGS)}")
    return config.CONFIGS[name]
