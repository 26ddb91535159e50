"""Plant a bug in a copy of the project, and see whether the tests of that file catch it.

    python tests/plant.py masks.py "q_block >= k_block" "q_block > k_block"
    python tests/plant.py dmd.py "adam_lr=2e-5" "adam_lr=2e-4" --tests tests/test_dmd.py

The text before must occur once in the file. Prints the changed line and the first test that fails.
Exit status: 0 if the bug is caught, 1 if it lives, 2 if it cannot be planted.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from order import ROOT, imports_of


def tests_of(file) -> list[str]:
    """The tests that are named after a file of the project, then those that import it.

    >>> tests_of("film/writer.py")
    ['tests/test_endings.py', 'tests/test_generate.py', 'tests/test_live.py']
    """
    all_tests = sorted((ROOT / "tests").glob("test_*.py"))
    named = [test for test in all_tests if test.name.startswith(f"test_{Path(file).stem}")]
    others = [test for test in all_tests if test not in named and file in imports_of(test)]
    return [str(test.relative_to(ROOT)) for test in named + others]


def planted(file, old, new) -> str:
    """The source of a file with one change.  Raises ValueError if `old` does not occur once."""
    source = (ROOT / file).read_text("utf-8")
    if source.count(old) != 1:
        raise ValueError(f"{old!r} occurs {source.count(old)} times in {file}; expected once")
    return source.replace(old, new)


def copy_project(folder):
    """Copy the tracked and the new files; weights are links."""
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    for name in subprocess.check_output(listed, cwd=ROOT, text=True).split("\0"):
        source, target = ROOT / name, folder / name
        if name and source.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            if source.suffix == ".safetensors":
                target.symlink_to(source)
            else:
                shutil.copyfile(source, target)


def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("file", help="path in the project")
    p.add_argument("old", help="text to replace")
    p.add_argument("new", help="text to put in its place")
    p.add_argument("--tests", nargs="+", help="tests to run; default: those of the file")
    args = p.parse_args()
    try:
        source = planted(args.file, args.old, args.new)
    except (ValueError, OSError) as error:
        p.error(str(error))
    with tempfile.TemporaryDirectory() as folder:
        copy_project(Path(folder))
        Path(folder, args.file).write_text(source, "utf-8")
        command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", "--no-header"]
        tests = args.tests or [*tests_of(args.file), args.file]  # the file for its doctests
        run = subprocess.run([*command, *tests], cwd=folder, capture_output=True, text=True)
    print(f"- {args.old}\n+ {args.new}")
    print(next((x for x in run.stdout.splitlines() if x.startswith(("FAILED", "ERROR"))), ""))
    print("caught" if run.returncode else "it lives")
    sys.exit(0 if run.returncode else 1)


if __name__ == "__main__":
    main()
