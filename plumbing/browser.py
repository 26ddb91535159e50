"""A headless Chromium, driven over its DevTools protocol with the standard library alone."""

import base64
import contextlib
import json
import os
import shutil
import socket
import struct
import subprocess
import tempfile
import time
import urllib.request
from pathlib import Path

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = (
    "--headless",
    "--hide-scrollbars",
    "--no-sandbox",
    "--disable-gpu",
    "--remote-debugging-port=0",
)


class Tab:
    """A page, spoken to over a WebSocket: JSON messages, each in a frame."""

    def __init__(self, address):
        host, port = address.split("/")[2].split(":")
        self.socket = socket.create_connection((host, int(port)), timeout=60)
        self.file, self.count = self.socket.makefile("rb"), 0
        key = base64.b64encode(os.urandom(16)).decode()
        head = f"GET {address.split(port, 1)[1]} HTTP/1.1\r\nHost: {host}:{port}\r\n"
        head += "Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
        self.socket.sendall(f"{head}Sec-WebSocket-Key: {key}\r\n\r\n".encode())
        while self.file.readline().strip():
            pass  # the head of the answer

    def send(self, method, **params):
        """Call a method of the protocol; return its result."""
        self.count += 1
        data = json.dumps({"id": self.count, "method": method, "params": params}).encode()
        # A client masks its frames; a mask of zeros changes nothing.
        head = struct.pack(">BBQ", 0x81, 0xFF, len(data)) + bytes(4)
        self.socket.sendall(head + data)
        while (answer := self._receive()).get("id") != self.count:
            pass  # events of the browser
        assert "result" in answer, answer
        return answer["result"]

    def _receive(self):
        data, is_last = b"", False
        while not is_last:
            first, length = self.file.read(2)
            is_last = first >= 0x80
            if length > 125:  # the length of a long frame follows, in 2 or 8 bytes
                length = int.from_bytes(self.file.read(2 if length == 126 else 8))
            data += self.file.read(length)
        return json.loads(data)

    def run(self, code):
        """Run JavaScript as if a button had been pressed; wait for a promise; return its value."""
        how = dict(awaitPromise=True, returnByValue=True, userGesture=True)
        answer = self.send("Runtime.evaluate", expression=code, **how)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait(self, code, seconds=20):
        """Wait until JavaScript gives something true; return it."""
        end = time.monotonic() + seconds
        while not (value := self.run(code)):
            assert time.monotonic() < end, f"not within {seconds} s: {code}"
            time.sleep(0.05)
        return value

    def go(self, link):
        self.send("Page.enable")
        self.send("Page.navigate", url=link)
        self.wait(f"document.readyState == 'complete' && location.href == {json.dumps(link)}")

    def close(self):
        self.file.close()
        self.socket.close()

    def picture(self) -> bytes:
        """Return the visible part of the page as a PNG."""
        return base64.b64decode(self.send("Page.captureScreenshot")["data"])


@contextlib.contextmanager
def opened(link, width=1100, height=800, *flags):
    """Open a link in a browser of its own: -> its Tab."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        size = f"--window-size={width},{height}"
        command = [CHROMIUM, *FLAGS, *flags, size, f"--user-data-dir={folder}", "about:blank"]
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        try:
            place = Path(folder, "DevToolsActivePort")
            end = time.monotonic() + 60
            while not (place.exists() and place.read_text("utf-8").count("\n")):
                assert time.monotonic() < end and process.poll() is None, "Chromium did not start"
                time.sleep(0.05)
            port = place.read_text("utf-8").split()[0]
            tabs = json.load(urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list"))
            tab = Tab(next(t["webSocketDebuggerUrl"] for t in tabs if t["type"] == "page"))
            tab.go(link)
            try:
                yield tab
            finally:
                tab.go("about:blank")  # a page that is left can still say so; a killed one cannot
                tab.close()
        finally:
            process.terminate()
            process.wait()
