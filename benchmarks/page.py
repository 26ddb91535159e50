"""Write measured tables into benchmarks/README.md."""

from pathlib import Path

from plumbing import cli, files

PAGE = cli.ROOT / "benchmarks" / "README.md"


def fill_in(name, text, page=PAGE):
    """Replace the text between the two marks <!-- name --> of a Markdown file.

    Raises ValueError for a file without these marks.
    """
    mark, old = f"<!-- {name} -->", Path(page).read_text()
    if old.count(mark) != 2:
        raise ValueError(
            f"{page}: expected the mark {mark} twice, found it {old.count(mark)} times"
        )
    before, _, after = old.split(mark)
    new = f"{before}{mark}\n{text}\n{mark}{after}"
    files.write_beside(page, lambda p: p.write_text(new))
