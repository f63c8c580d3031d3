"""The report on this build and machine, for bug reports."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import platform
import re
from pathlib import Path

import torch

from refrag_kernels import extension, selection
from refrag_kernels.support import OPS
from refrag_kernels.version import __version__


@dataclasses.dataclass(frozen=True)
class Report:
    """The result of ``backends.report()``.

    Attributes
    ----------
    versions : dict
        Version of each package and of Python; None if not installed.
    machine : dict
        The system, the CPU and the number of torch's threads.
    devices : list of str
        The devices that torch can use.
    build : dict
        For each compiled module its contents, or why it is missing.
    backends : dict
        For each backend why it can't run here; None if it can.
    ops : dict
        For each op and device type the backends that can run it, fastest first.
    fallbacks : dict
        For each op with backends that have no kernel of their own: backend -> the backend that runs instead.
    environment : dict
        The environment variables that affect which backend runs.
    """

    versions: dict[str, str | None]
    machine: dict[str, str]
    devices: list[str]
    build: dict[str, str]
    backends: dict[str, str | None]
    ops: dict[str, dict[str, list[str]]]
    fallbacks: dict[str, dict[str, str]]
    environment: dict[str, str]

    def __str__(self) -> str:
        sections = {
            "versions": {name: version or "not installed" for name, version in self.versions.items()},
            "machine": self.machine | {"devices": ", ".join(self.devices)},
            "build": self.build,
            "backends": {name: "no: " + reason if reason else "yes" for name, reason in self.backends.items()},
            "ops": {
                op: "; ".join(
                    f"{device}: {', '.join(self._with_fallback(op, name) for name in names)}"
                    for device, names in served.items()
                )
                for op, served in self.ops.items()
            },
            "environment": self.environment,
        }
        width = max(len(name) for section in sections.values() for name in section)
        lines = []
        for title, section in sections.items():
            lines += [title, *(f"  {name:<{width}}  {value}" for name, value in section.items())] if section else []
        return _without_paths("\n".join(lines))

    def _with_fallback(self, op: str, backend: str) -> str:
        other = self.fallbacks.get(op, {}).get(backend)
        return f"{backend} (runs {other})" if other else backend


def collect() -> Report:
    """Inspect the build and the machine; the public function is ``backends.report``."""
    types = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    ops = {op: {device: selection.available(op, torch.device(device)) for device in types} for op in sorted(OPS)}
    fallbacks = {
        op: {name: row.support.fallback for name, row in OPS[op].implementations.items() if row.support.fallback}
        for op in sorted(OPS)
    }
    return Report(
        versions={
            "refrag-kernels": __version__,
            "python": platform.python_version(),
            **{name: _version(name) for name in ("torch", "triton", "transformers")},
        },
        machine={
            "system": f"{platform.system()} {platform.machine()} {' '.join(platform.libc_ver())}",
            "cpu": _cpu_model(),
            "threads": str(torch.get_num_threads()),
        },
        devices=_devices(),
        build=_build(),
        backends=selection.missing(),
        ops=ops,
        fallbacks={op: names for op, names in fallbacks.items() if names},
        environment={name: value for name, value in sorted(os.environ.items()) if name.startswith("REFRAG_KERNELS_")},
    )


def _version(package: str) -> str | None:
    try:
        # torch.__version__ names the build, such as +cpu, even if the package's metadata does not.
        return torch.__version__ if package == "torch" else importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str:
    try:
        match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        match = None
    return match.group(1) if match else platform.processor() or platform.machine()


def _devices() -> list[str]:
    devices = ["cpu"]
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        major, minor = torch.cuda.get_device_capability(index)
        architecture = "ROCm" if torch.version.hip else f"sm_{major}{minor}"
        devices.append(f"cuda:{index} ({torch.cuda.get_device_name(index)}, {architecture})")
    return devices


def _build() -> dict[str, str]:
    try:
        extension.planner()
        planner = "loaded"
    except ImportError as error:
        planner = str(error)
    reason = extension.load_error()
    if reason is not None:
        return {"_planner": planner, "_C": reason}
    try:
        instructions = torch.ops.refrag_cpu.active_isa()
    except RuntimeError as error:  # REFRAG_KERNELS_ISA requests one that this machine can't run
        instructions = f"none: {error}"
    architectures = ", ".join(f"sm_{name.strip()}" for name in torch.ops.refrag_cuda.architectures().split(",") if name)
    return {
        "_planner": planner,
        "_C": "loaded",
        "cpu kernels": instructions,
        "cuda kernels": architectures or f"none: {extension.NO_CUDA}",
    }


def _without_paths(text: str) -> str:
    """Shorten absolute paths in ``text`` to their last part: folders may contain the name of a user."""
    return re.sub(r"(?<![\w.])(?:/[^\s/:'\",;]+)+/([^\s/:'\",;]+)", r"\1", text)
