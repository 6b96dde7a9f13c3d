"""The real ComfyUI server as a process of its own, and the HTTP calls of its users."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[3]
FRONT_END = "PHASED_DMD_FRONT_END"
"""The variable that names another front end: ``static`` of an unpacked wheel of comfyui_frontend_package."""
PATIENCE = 600
"""Seconds that anything may take on a busy machine."""


def make_base(folder: Path) -> Path:
    """An empty base directory with this repository linked as its only node pack."""
    models = [f"models/{name}" for name in ("diffusion_models", "loras", "phased_experts", "diffusers", "vae")]
    for name in ("custom_nodes", *models, "models/text_encoders", "input", "output"):
        (folder / name).mkdir(parents=True)
    (folder / "custom_nodes/phased-dmd").symlink_to(REPOSITORY)
    return folder


def make_named_files(base: Path) -> None:
    """Empty files under the names that the example workflows ask for, so that none is missing in the front end."""
    for path in (REPOSITORY / "workflows").glob("*.json"):
        for node in json.loads(path.read_text())["nodes"]:
            files = [(model["directory"], model["name"]) for model in node["properties"].get("models", [])]
            names = [value for value in node.get("widgets_values", []) if str(value).endswith(".safetensors")]
            for directory, name in files + [("loras", name) for name in names if not files]:
                (base / "models" / directory).mkdir(exist_ok=True)
                (base / "models" / directory / name).touch()
    (base / "input/example.png").write_bytes(_DOT)


_DOT = bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000001000000010802000000907753de0000000c49444154789c63606060000000040001f61738550000"
    "000049454e44ae426082"
)
"""A picture of one pixel."""


@dataclass(frozen=True)
class Server:
    """A server that answers."""

    url: str
    base: Path
    log: Path

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(self.url + path, timeout=PATIENCE) as answer:
            data = answer.read()
            return json.loads(data) if "json" in answer.headers["Content-Type"] else data

    def post(self, path: str, body: Any) -> Any:
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}, method="POST"
        )
        try:
            with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
                return json.loads(answer.read() or b"null")
        except urllib.error.HTTPError as error:
            return {"status": error.code, **json.loads(error.read())}

    def queue(self, prompt: dict[str, Any]) -> str:
        """Queue a workflow in API format; every one of its outputs must validate."""
        answer = self.post("/prompt", {"prompt": prompt})
        assert answer.get("node_errors") == {}, answer
        return answer["prompt_id"]

    def finished(self, prompt_id: str) -> dict[str, Any]:
        """Its history, once it has ended in whatever way."""
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            history = self.get(f"/history/{prompt_id}")
            if prompt_id in history:
                return history[prompt_id]
            time.sleep(0.1)
        raise TimeoutError(self.log.read_text()[-4000:])

    def finish(self) -> None:
        """Wait until every queued prompt has ended."""
        deadline = time.monotonic() + PATIENCE
        while any(self.get("/queue").values()):
            if time.monotonic() > deadline:
                raise TimeoutError(self.log.read_text()[-4000:])
            time.sleep(0.1)

    def run(self, prompt: dict[str, Any]) -> dict[str, Any]:
        """Queue, wait, and return the outputs by node; fails with the server's own messages."""
        history = self.finished(self.queue(prompt))
        assert history["status"]["status_str"] == "success", history["status"]["messages"]
        return history["outputs"]

    def picture(self, image: dict[str, str]) -> bytes:
        """The bytes of an image of a node's output."""
        return self.get(f"/view?filename={image['filename']}&subfolder={image['subfolder']}&type={image['type']}")


@contextlib.contextmanager
def running(tree: Path, base: Path) -> Iterator[Server]:
    """Start ``main.py`` of this tree on a free port, with this interpreter; stop it at the end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "main.py", "--cpu", "--listen", "127.0.0.1", "--port", str(port)]
    command += ["--disable-auto-launch", "--base-directory", str(base), "--disable-api-nodes"]
    command += ["--preview-method", "latent2rgb"]
    if os.environ.get(FRONT_END):
        command += ["--front-end-root", os.environ[FRONT_END]]
    if "--database-url" in (tree / "comfy/cli_args.py").read_text():
        command += ["--database-url", "sqlite:///:memory:"]
    log = base / "server.log"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with log.open("w") as output:
        process = subprocess.Popen(command, cwd=tree, stdout=output, stderr=subprocess.STDOUT, env=environment)
    try:
        server = Server(f"http://127.0.0.1:{port}", base, log)
        _wait(server, process)
        failed = [line for line in log.read_text().splitlines() if "IMPORT FAILED" in line and "phased-dmd" in line]
        assert not failed, log.read_text()  # core's own nodes may lack what this machine does not have
        yield server
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait(server: Server, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"the server ended with {process.returncode}: {server.log.read_text()[-4000:]}")
        with contextlib.suppress(OSError):
            server.get("/system_stats")
            return
        time.sleep(0.2)
    raise TimeoutError(server.log.read_text()[-4000:])
