"""The first step of every notebook: find the project, and install missing packages.

Afterwards `import masks` and paths such as "weights/toy_dmd.safetensors" work. The notebook may
start in notebooks/ or in the folder above.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HOSTED = "COLAB_RELEASE_TAG", "KAGGLE_KERNEL_RUN_TYPE"  # environment of hosted notebooks


def start():
    """Go to the project's root, and check that the packages of requirements.txt are there.

    A hosted notebook installs missing packages. Elsewhere it raises ImportError with the command to
    type, because nothing should be installed into somebody's Python unasked.
    """
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    from exercises import behind  # here, because only now it is found

    behind.stand_behind()  # a hand-out lacks the bodies that its exercises ask for
    if missing := missing_packages(Path("requirements.txt").read_text("utf-8")):
        if not any(name in os.environ for name in HOSTED):
            raise ImportError(f"{', '.join(missing)}: run pip install -r requirements.txt")
        subprocess.run([sys.executable, "-m", "pip", "install", *missing], check=True)
        importlib.invalidate_caches()


def missing_packages(requirements) -> list[str]:
    """Return the requirements whose package cannot be imported, whatever its version."""
    wanted = [line for line in requirements.splitlines() if "==" in line]
    return [line for line in wanted if importlib.util.find_spec(line.partition("==")[0]) is None]
