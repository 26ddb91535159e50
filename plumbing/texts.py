"""Text files: UTF-8, whatever the system's own encoding is."""

import codecs
import contextlib
import json
from pathlib import Path


def read_text(path) -> str:
    """Read a text file in UTF-8, or in UTF-16 with a byte order mark, as editors do."""
    try:
        data = Path(path).read_bytes()
        is_utf16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        return data.decode("utf-16" if is_utf16 else "utf-8-sig")
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        line = 1 + error.object[: error.start].count(b"\n")
        where = "" if is_utf16 else f" in line {line}"
        raise ValueError(f"{path}: expected text in UTF-8 ({error.reason}{where})") from None


def read_json(path) -> dict:
    """Read a JSON object from a text file."""
    text = read_text(path)
    with contextlib.suppress(ValueError, RecursionError):
        if isinstance(found := json.loads(text), dict):
            return found
    raise ValueError(f"{path}: not whole; expected a JSON object")
