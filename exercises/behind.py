"""What stands behind an answer: the project, with the bodies that a hand-out leaves out.

An answer is graded, run and filmed with right code behind it, never with other answers: a mistake
in `masks` costs no points in `kv_cache`, an exercise may be skipped, and points at home are those
in class. So a hand-out holds the missing bodies as well, compressed in reference.bin. A student
does not read them by chance; who searches for solutions finds them in the public project anyway.

This file imports nothing but Python: notebooks call it before packages are installed.
"""

import ast
import importlib.machinery
import importlib.util
import json
import sys
import zlib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACK = Path(__file__).with_name("reference.bin")  # in hand-outs only


def functions_in(source) -> dict[str, ast.FunctionDef]:
    """Return the functions of a module by name, methods as Class.method.

    >>> list(functions_in("def f(): pass\\nclass C:\\n    def g(self): pass"))
    ['f', 'C.g']
    """
    tree, found = source if isinstance(source, ast.Module) else ast.parse(source), {}
    for node in tree.body:
        is_class = isinstance(node, ast.ClassDef)
        for f in node.body if is_class else [node]:
            if isinstance(f, ast.FunctionDef):
                found[f"{node.name}.{f.name}" if is_class else f.name] = f
    return found


# ---- the pack ----


def bodies_of(source, functions) -> dict[str, str]:
    """Return the bodies of these functions without docstrings and comments.

    >>> bodies_of('def f():\\n    "Return 1."\\n    return 1  # one', ["f"])
    {'f': 'return 1'}
    """
    nodes, found = functions_in(source), {}
    for name in functions:
        has_docstring = ast.get_docstring(nodes[name]) is not None
        found[name] = ast.unparse(ast.Module(nodes[name].body[has_docstring:], []))
    return found


def pack(bodies) -> bytes:
    """Pack {module: {function: body}}."""
    return zlib.compress(json.dumps(bodies).encode())


def unpack() -> dict:
    """Return what was packed into this hand-out, and nothing in the project itself."""
    return json.loads(zlib.decompress(PACK.read_bytes())) if PACK.exists() else {}


# ---- importing ----


class Loader(importlib.machinery.SourceFileLoader):
    """Loads a file, with other bodies for some of its functions."""

    def __init__(self, module, path, bodies=None):
        super().__init__(module, str(path))
        self.bodies = bodies or {}

    def get_code(self, module):
        # Always compiled from the source: Python's cache would hold the file without the bodies.
        tree = ast.parse(self.get_data(self.path), self.path)
        for function, node in functions_in(tree).items():
            if function in self.bodies:
                body, line = ast.parse(self.bodies[function]).body, node.body[-1].lineno
                for part in (part for statement in body for part in ast.walk(statement)):
                    # Tracebacks show the line of the hole, and inspect.getsource shows the hole.
                    part.lineno = part.end_lineno = line
                    part.col_offset = part.end_col_offset = 0
                node.body[ast.get_docstring(node) is not None :] = body
        return compile(tree, self.path, "exec", dont_inherit=True)

    def exec_module(self, module):
        room, _, short = module.__name__.rpartition(".")
        if room:  # Python sets it after the import only, too late for files that this one imports
            setattr(sys.modules[room], short, module)
        super().exec_module(module)


class Finder:
    """Finds modules before Python does: answers, and files of a hand-out with their bodies.

    answers   module -> the file that replaces it
    """

    def __init__(self, answers=()):
        self.answers, self.bodies = dict(answers), unpack()

    def find_spec(self, module, path=None, target=None):
        if module in self.answers:
            loader = Loader(module, self.answers[module])
        elif module in self.bodies:
            file = ROOT / f"{module.replace('.', '/')}.py"
            loader = Loader(module, file, self.bodies[module])
        else:
            return None
        return importlib.util.spec_from_file_location(module, loader.path, loader=loader)


def stand_behind(answers=()) -> Finder:
    """Let all later imports find the answers, and right code behind them."""
    sys.meta_path.insert(0, finder := Finder(answers))
    return finder
