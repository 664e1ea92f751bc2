"""A real browser for tests: Debian's Chromium without a window, driven over a pipe by the DevTools protocol."""

import base64
import json
import os
import shutil
import subprocess
import time
from pathlib import Path

PROGRAM = shutil.which("chromium") or shutil.which("chromium-browser")
PATIENCE = 60.0  # seconds


class Browser:
    """One tab. A context manager."""

    def __init__(self, folder: Path) -> None:
        assert PROGRAM is not None
        # Chromium reads commands from descriptor 3 and writes answers to descriptor 4, each ended by a zero byte.
        read_command, self._commands = os.pipe()
        self._answers, write_answer = os.pipe()

        def place() -> None:
            # Copied away first: one of the four may be 3 or 4 itself.
            one, other = os.dup(read_command), os.dup(write_answer)
            os.dup2(one, 3)
            os.dup2(other, 4)

        options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
        self._process = subprocess.Popen(
            [
                PROGRAM,
                *options,
                "--remote-debugging-pipe",
                f"--user-data-dir={folder}",
                "--window-size=1200,800",
                "about:blank",
            ],
            close_fds=False,
            preexec_fn=place,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(read_command)
        os.close(write_answer)
        self._number, self._rest = 0, b""
        self.complaints: list[dict] = []
        pages = [target for target in self("Target.getTargets")["targetInfos"] if target["type"] == "page"]
        target = pages[0]["targetId"] if pages else self("Target.createTarget", url="about:blank")["targetId"]
        self._session = self("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]

    _session: str | None = None

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._commands)
        os.close(self._answers)

    def __call__(self, method: str, **parameters: object) -> dict:
        """Send a command and wait for its answer."""
        self._number += 1
        command = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            command["sessionId"] = self._session
        os.write(self._commands, json.dumps(command).encode() + b"\0")
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            while b"\0" not in self._rest:
                self._rest += os.read(self._answers, 65536)
            message, self._rest = self._rest.split(b"\0", 1)
            answer = json.loads(message)
            if self._complains(answer):
                self.complaints.append(answer)
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]
        raise TimeoutError(method)

    @staticmethod
    def _complains(message: dict) -> bool:
        """Whether a message is a script's error, or what the browser says of an error or a breach of the page's policy.

        It says so after "Runtime.enable" and "Log.enable".
        """
        kind, given = message.get("method"), message.get("params", {})
        return (
            kind == "Runtime.exceptionThrown"
            or (kind == "Runtime.consoleAPICalled" and given["type"] in ("error", "warning", "assert"))
            or (kind == "Log.entryAdded" and given["entry"]["level"] in ("error", "warning"))
        )

    def run(self, script: str) -> object:
        """The value of an expression in the page; a promise is awaited."""
        answer = self("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def wait(self, script: str) -> None:
        """Until an expression is true."""
        deadline = time.monotonic() + PATIENCE
        while not self.run(script):
            assert time.monotonic() < deadline, f"never true: {script}"
            time.sleep(0.02)

    def key(self, name: str, code: int) -> None:
        """Press a key."""
        for kind in ("keyDown", "keyUp"):
            self("Input.dispatchKeyEvent", type=kind, key=name, code=name, windowsVirtualKeyCode=code)

    def click(self, selector: str) -> None:
        """Press the mouse in the middle of an element."""
        script = (
            f"(({{x, y, width, height}}) => [x + width / 2, y + height / 2])(document.querySelector({json.dumps(selector)})"
        )
        x, y = self.run(f"{script}.getBoundingClientRect())")
        for kind in ("mousePressed", "mouseReleased"):
            self("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def screenshot(self) -> bytes:
        return base64.b64decode(self("Page.captureScreenshot", format="png")["data"])
