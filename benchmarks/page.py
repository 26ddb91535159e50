"""Tables of measurements in Markdown, and their places in benchmarks/README.md."""

from pathlib import Path

from plumbing import cli, files

PAGE = cli.ROOT / "benchmarks" / "README.md"


def table(head, rows) -> str:
    """Return a Markdown table.

    >>> print(table(["speed-up", "ms"], [["graph", "437"], ["merge", ""]]))
    | speed-up | ms |
    |---|---|
    | graph | 437 |
    | merge | – |
    """
    filled = [[cell or "–" for cell in row] for row in rows]  # a dash: not measured
    first, *others = (f"| {' | '.join(row)} |" for row in (head, *filled))
    return "\n".join([first, "|---" * len(head) + "|", *others])


def json_path(args, name) -> Path:
    """Return the file for the measurements: --out, or NAME.json in results/ (runs/ for --tiny)."""
    folder = "runs" if args.tiny else "results"  # a test of the script replaces no result
    return Path(args.out or cli.ROOT / folder / f"{name}.json")


def fill_in(name, text, page=PAGE):
    """Replace the text between the two marks <!-- name --> of a Markdown file.

    Raises ValueError for a file without these marks.
    """
    mark, old = f"<!-- {name} -->", Path(page).read_text("utf-8")
    if old.count(mark) != 2:
        raise ValueError(
            f"{page}: expected the mark {mark} twice, found it {old.count(mark)} times"
        )
    before, _, after = old.split(mark)
    new = f"{before}{mark}\n{text}\n{mark}{after}"
    # the page is never half written, even if the program is killed now
    files.write_beside(page, lambda p: p.write_text(new, "utf-8"))
