"""A browser to look at pages with: headless Chromium, driven over a pipe in the DevTools protocol. Nothing is listened on."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-dev-shm-usage --no-first-run --disable-background-networking "
    "--disable-extensions --disable-component-update --remote-debugging-pipe"
).split()


class Browser:
    """One page of a running Chromium. errors: what went to its console as an error; requests: every address it asked for."""

    def __init__(self, read: int, write: int) -> None:
        self.read, self.write = read, write
        self.held, self.count, self.session = b"", 0, ""
        self.errors: list[str] = []
        self.requests: list[str] = []
        self.loaded = 0
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def send(self, method: str, *, wait: float = 60.0, **parameters: Any) -> dict[str, Any]:
        """One command and its result. Raises RuntimeError with what the browser says is wrong."""
        self.count += 1
        message = {"id": self.count, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next(wait)
            if answer.get("id") == self.count:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]

    def open(self, page: Path, *, anchor: str = "") -> None:
        """Load a page and wait until it is loaded; where only the anchor is new, until the page has heard of it."""
        seen = self.loaded
        went = self.send("Page.navigate", url=page.resolve().as_uri() + (f"#{anchor}" if anchor else ""))
        while "loaderId" in went and self.loaded == seen:
            self._next(60.0)
        self.run("new Promise(done => requestAnimationFrame(() => setTimeout(done)))")

    def run(self, script: str) -> Any:
        """The value of an expression in the page; a promise is awaited."""
        found = self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in found:
            raise RuntimeError(str(found["exceptionDetails"].get("exception", {}).get("description")))
        return found["result"].get("value")

    def press(self, key: str) -> None:
        """A key, down and up."""
        for kind in ("keyDown", "keyUp"):
            text = {"text": key} if len(key) == 1 and kind == "keyDown" else {}
            self.send("Input.dispatchKeyEvent", type=kind, key=key, **text)

    def look(self, path: Path, *, width: int = 1200, height: int = 900, dark: bool = False) -> None:
        """A screenshot of the given size."""
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.send("Emulation.setEmulatedMedia", features=scheme)
        self.size(width, height)
        path.write_bytes(base64.b64decode(self.send("Page.captureScreenshot")["data"]))

    def size(self, width: int, height: int) -> None:
        """The size of the window, in pixels."""
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def _next(self, wait: float) -> dict[str, Any]:
        deadline = time.monotonic() + wait
        while b"\0" not in self.held:
            if not select.select([self.read], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise TimeoutError(f"Chromium said nothing for {wait:.0f} s.")
            some = os.read(self.read, 1 << 20)
            if not some:
                raise RuntimeError("Chromium ended.")
            self.held += some
        line, _, self.held = self.held.partition(b"\0")
        answer: dict[str, Any] = json.loads(line)
        self._note(answer.get("method", ""), answer.get("params", {}))
        return answer

    def _note(self, method: str, said: dict[str, Any]) -> None:
        if method == "Page.loadEventFired":
            self.loaded += 1
        elif method == "Network.requestWillBeSent" and not said["request"]["url"].startswith("data:"):
            self.requests.append(said["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            self.errors.append(str(said["exceptionDetails"].get("exception", {}).get("description")))
        elif method == "Runtime.consoleAPICalled" and said["type"] in ("error", "warning", "assert"):
            self.errors.append(str(said["args"]))
        elif method == "Log.entryAdded" and said["entry"]["level"] in ("error", "warning"):
            self.errors.append(said["entry"]["text"])


@contextmanager
def browser(profile: Path) -> Iterator[Browser]:
    """A Chromium of its own, its files in `profile`; ended with the block."""
    assert CHROMIUM is not None, "no chromium"
    (theirs_in, ours_out), (ours_in, theirs_out) = os.pipe(), os.pipe()
    high = [fcntl.fcntl(fd, fcntl.F_DUPFD, 10) for fd in (theirs_in, theirs_out)]  # 3 and 4 are still to be given
    script = f'exec "$@" 3<&{high[0]} 4>&{high[1]}'  # the protocol's pipes are descriptors 3 and 4
    command = ["bash", "-c", script, "chromium", CHROMIUM, *FLAGS, f"--user-data-dir={profile}"]
    process = subprocess.Popen(command, pass_fds=high, stderr=subprocess.DEVNULL)
    for fd in (theirs_in, theirs_out, *high):
        os.close(fd)
    try:
        yield Browser(ours_in, ours_out)
    finally:
        os.close(ours_out)  # Chromium ends with its pipe
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        os.close(ours_in)
