"""Execute the notebooks in place, from the first cell to the last, without Jupyter.

    python notebooks/run.py             all notebooks; outputs and pictures are written back
    python notebooks/run.py 01 06       the notebooks whose names begin with 01 or 06
    python notebooks/run.py --check     checks that every cell runs; writes nothing

Each notebook runs in a process of its own, which starts in this folder. Cells are plain Python. The
outputs of a cell are its printed text and the value of its last line, in the forms that Jupyter
shows: PNG (`_repr_png_` or a figure), HTML (`_repr_html_`), text.
"""

import argparse
import ast
import base64
import contextlib
import io
import json
import linecache
import multiprocessing
import os
import sys
import time
import traceback
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
DPI = 80  # resolution of figures that a cell leaves open
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


class CellError(Exception):
    """A cell failed.  The message names the cell and shows the traceback."""


# ---- one cell ----


def run_cell(source, namespace, title) -> list[dict]:
    """Execute one cell; return its outputs in the format of notebook files.

    namespace   variables of the earlier cells; the cell adds its own
    title       file name to show in tracebacks
    """
    # Tracebacks and inspect.getsource look up the lines of a cell here.
    linecache.cache[title] = (len(source), None, source.splitlines(keepends=True), title)
    statements, last = ast.parse(source).body, None
    if statements and isinstance(statements[-1], ast.Expr):
        last = ast.Expression(statements.pop().value)
    printed, value = io.StringIO(), None
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(io.StringIO()):
        exec(compile(ast.Module(statements, []), title, "exec"), namespace)
        if last:
            value = eval(compile(last, title, "eval"), namespace)
    outputs = []
    if printed.getvalue():
        outputs.append(
            {"name": "stdout", "output_type": "stream", "text": lines(printed.getvalue())}
        )
    outputs += [output("display_data", figure) for figure in open_figures()]
    return outputs + ([output("execute_result", value)] if value is not None else [])


def output(kind, value) -> dict:
    """Return a notebook output with every form in which this value can be shown."""
    data = {"text/plain": lines(repr(value))}
    if hasattr(value, "_repr_html_"):
        data["text/html"] = lines(value._repr_html_())
    if png := png_of(value):
        data["image/png"] = base64.b64encode(png).decode()
    return {"data": data, "metadata": {}, "output_type": kind}


def png_of(value) -> bytes | None:
    """Return a picture or a figure as a PNG, anything else as None."""
    if hasattr(value, "_repr_png_"):
        return value._repr_png_()
    if hasattr(value, "savefig"):
        buffer = io.BytesIO()
        value.savefig(buffer, dpi=DPI, format="png")
        return buffer.getvalue()
    return None


def open_figures():
    """Yield the figures that the cell has left open, and close them."""
    plt = sys.modules.get("matplotlib.pyplot")
    for number in plt.get_fignums() if plt else ():
        figure = plt.figure(number)
        yield figure
        plt.close(figure)


def lines(text) -> list[str]:
    """Split text as notebook files store it: one string per line."""
    return text.splitlines(keepends=True)


# ---- one notebook ----


def code_cells(notebook) -> list[dict]:
    """Return the code cells in order."""
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def execute(notebook, name):
    """Run all code cells in order, and store their outputs and counts.  Raises CellError."""
    namespace = {"__name__": "__main__"}
    for count, cell in enumerate(code_cells(notebook), 1):
        title = f"{name}, code cell {count}"
        try:
            outputs = run_cell("".join(cell["source"]), namespace, title)
        except Exception as error:
            raise CellError(f"{title} failed:\n{traceback.format_exc()}") from error
        cell["execution_count"] = count
        cell["outputs"] = [
            {"execution_count": count, **o} if o["output_type"] == "execute_result" else o
            for o in outputs
        ]
    notebook["metadata"] = METADATA


def work(path, check):
    """Execute one notebook file and print one line about it.  Runs in a process of its own."""
    os.environ.setdefault("MPLBACKEND", "Agg")
    os.chdir(FOLDER)  # Jupyter starts a notebook in its own folder
    notebook, start = json.loads(path.read_text(encoding="utf-8")), time.perf_counter()
    try:
        execute(notebook, path.stem)
    except CellError as error:
        sys.exit(str(error))
    if not check:
        text = json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"
        beside = path.with_suffix(".partial")  # a kill never leaves half a notebook
        beside.write_text(text, encoding="utf-8")
        beside.replace(path)
    cells, seconds = len(code_cells(notebook)), time.perf_counter() - start
    size = path.stat().st_size / 1000
    print(f"{path.stem:20} {cells:3} cells {seconds:6.1f} s {size:6.0f} kB", flush=True)


def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("names", nargs="*", help="how names begin; default: all notebooks")
    p.add_argument("--check", action="store_true", help="execute, but write nothing")
    args = p.parse_args()
    paths = sorted(FOLDER.glob("*.ipynb"))
    for name in args.names:
        if not any(path.name.startswith(name) for path in paths):
            p.error(f"no notebook begins with {name!r}")
    if args.names:
        paths = [path for path in paths if path.name.startswith(tuple(args.names))]
    failed = []
    for path in paths:
        process = multiprocessing.get_context("spawn").Process(target=work, args=(path, args.check))
        process.start()
        process.join()
        if process.exitcode:
            failed.append(path.stem)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
