"""Models by Hugging Face id: what is asked for, with which token, and what a failure says.

A hub of a few files is served on this machine to a process of its own, because huggingface_hub reads its environment
when it is imported. Errors are raised into nybble in huggingface_hub's place.
"""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from nybble.core.config import EngineConfig
from nybble.core.errors import ModelError
from nybble.models.checkpoint import Checkpoint

REPO, COMMIT, TOKEN = "someone/model", "0123456789abcdef0123456789abcdef01234567", "hf_secret"
SMALL = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer.model", "merges.txt", "chat.jinja"]
WEIGHTS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"]
UNWANTED = [
    "pytorch_model.bin",
    "pytorch_model.bin.index.bin",
    "modeling_evil.py",
    "README.md",
    "consolidated.safetensors",
    "onnx/config.json",
    "original/model.safetensors",
    "model.gguf",
]


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as a snapshot takes. Every file holds `{}`."""

    files_asked: set[str]
    tokens: set[str | None]

    def do_HEAD(self) -> None:
        self.answer(with_body=False)

    def do_GET(self) -> None:
        self.answer(with_body=True)

    def answer(self, *, with_body: bool) -> None:
        path, files = self.path.partition("?")[0], f"/{REPO}/resolve/{COMMIT}/"
        if path.startswith(f"/api/models/{REPO}/revision/"):
            body: Any = {"id": REPO, "sha": COMMIT}
        elif path.startswith(f"/api/models/{REPO}/tree/"):
            names = [*SMALL, *WEIGHTS, *UNWANTED]
            body = [{"type": "file", "path": name, "size": 2, "oid": f"{i:040d}"} for i, name in enumerate(names)]
        elif path.startswith(files):
            self.files_asked.add(path.removeprefix(files))
            body = {}
        else:  # what the library likes to know besides
            self.send_error(404)
            return
        self.tokens.add(self.headers["Authorization"])
        content = json.dumps(body).encode()
        self.send_response(200)
        for name, value in (("Content-Type", "application/json"), ("ETag", '"1"'), ("X-Repo-Commit", COMMIT)):
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if with_body:
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Silence."""


@pytest.fixture
def hub() -> Iterator[tuple[str, type[Hub]]]:
    """The address, and what was seen."""
    handler = type("SeenHub", (Hub,), {"files_asked": set(), "tokens": set()})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", handler
    server.shutdown()
    server.server_close()


LOCATE = """
import sys
from nybble.core.config import EngineConfig
from nybble.core.errors import ModelError
from nybble.models.checkpoint import Checkpoint
try:
    print(Checkpoint.locate(EngineConfig(model=sys.argv[1], load_format=sys.argv[2])).path)
except ModelError as error:
    print("ModelError:", error)
"""


def locate(home: Path, load_format: str = "safetensors", **environment: str) -> subprocess.CompletedProcess[str]:
    quiet = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    # TQDM_POSITION = -1 shows bars although nobody looks.
    environment = {**quiet, "HF_HOME": str(home), "TQDM_POSITION": "-1", **environment}
    command = [sys.executable, "-c", LOCATE, REPO, load_format]
    return subprocess.run(command, capture_output=True, text=True, check=True, env=environment, timeout=60)


@pytest.mark.slow
def test_a_download(hub: tuple[str, type[Hub]], tmp_path: Path) -> None:
    """Wanted files only, with HF_TOKEN and a progress bar; afterwards HF_HUB_OFFLINE finds them without the hub."""
    address, seen = hub
    online = locate(tmp_path, HF_ENDPOINT=address, HF_TOKEN=TOKEN)
    path = Path(online.stdout.strip())
    assert sorted(file.name for file in path.iterdir()) == sorted([*SMALL, *WEIGHTS]), online.stderr
    assert seen.files_asked == {*SMALL, *WEIGHTS}
    assert seen.tokens == {f"Bearer {TOKEN}"}
    assert f"Fetching {len(SMALL) + len(WEIGHTS)} files: 100%" in online.stderr
    seen.tokens.clear()
    offline = locate(tmp_path, HF_ENDPOINT=address, HF_HUB_OFFLINE="1")
    assert offline.stdout == online.stdout
    assert not seen.tokens, "offline means offline"


@pytest.mark.slow
def test_dummy_weights_are_not_downloaded(hub: tuple[str, type[Hub]], tmp_path: Path) -> None:
    address, seen = hub
    assert locate(tmp_path, "dummy", HF_ENDPOINT=address).stdout.startswith(str(tmp_path))
    assert seen.files_asked == {*SMALL, "model.safetensors.index.json"}
    assert seen.tokens == {None}


@pytest.mark.slow
@pytest.mark.parametrize("why", [{"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}], ids=["set", "down"])
def test_offline_without_the_files(tmp_path: Path, why: dict[str, str]) -> None:
    said = locate(tmp_path, **why).stdout
    assert said.startswith(f"ModelError: {REPO} (no such directory here, so taken as a Hugging Face id): not in the ")
    assert "HF_HUB_OFFLINE" in said


def test_settings_reach_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: dict[str, Any] = {}

    def snapshot_download(repo_id: str, **arguments: Any) -> str:
        asked.update(arguments, repo_id=repo_id)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    (tmp_path / "config.json").write_text("{}")
    checkpoint = Checkpoint.locate(EngineConfig(model=REPO, revision="v2", download_dir="/somewhere"))
    assert checkpoint.path == tmp_path
    assert (asked["repo_id"], asked["revision"], asked["cache_dir"]) == (REPO, "v2", "/somewhere")
    assert asked.keys() <= {"repo_id", "revision", "cache_dir", "allow_patterns", "ignore_patterns"}, (
        "token, offline mode and progress bar are left to huggingface_hub and its environment"
    )


RESPONSE: Any = SimpleNamespace(status_code=404, headers={}, request=None)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (GatedRepoError("gated", response=RESPONSE), r"access is gated; accept its terms .* set HF_TOKEN"),
        (RepositoryNotFoundError("none", response=RESPONSE), r"not found; check the spelling, or set HF_TOKEN"),
        (RevisionNotFoundError("none", response=RESPONSE), r"has no revision 'v2'"),
        (
            LocalEntryNotFoundError("offline"),
            r"not in the local cache, and the hub cannot be reached or HF_HUB_OFFLINE",
        ),
        (HFValidationError("bad id"), r"neither a directory nor a Hugging Face id \(bad id\)"),
        (HfHubHTTPError("503", response=RESPONSE), r"download failed: 503"),
        (OSError(28, "No space left on device"), r"download failed: .*No space left"),
        (HTTPError("timed out"), r"download failed: timed out"),  # no OSError
        (RuntimeError("transfer broke"), r"download failed: transfer broke"),  # as the xet library raises
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_failures(monkeypatch: pytest.MonkeyPatch, error: Exception, message: str) -> None:
    def snapshot_download(*_: Any, **__: Any) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(ModelError, match=message) as caught:
        Checkpoint.locate(EngineConfig(model=REPO, revision="v2"))
    assert REPO in str(caught.value)
