"""What this build and this machine offer, in a form to paste into a bug report."""

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
    """What ``backends.report()`` found.

    Attributes
    ----------
    versions : dict
        Version of each package and of Python; None for one that is not installed.
    machine : dict
        The system, the CPU, how many threads torch uses on it.
    devices : list of str
        The devices that torch can use.
    build : dict
        For each part of the compiled code what it holds, or why it is not there.
    backends : dict
        For each backend why it can't run here; None when it can.
    ops : dict
        For each op and each type of device the backends that can run it, fastest first.
    fallbacks : dict
        For each op whose backends have no kernel of their own: backend -> the backend whose code it runs instead.
    environment : dict
        The variables that change what runs.
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
    """Look at the build and the machine; ``backends.report`` is its public name."""
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
        # torch's own version names its build, such as +cpu, also where the metadata of the package does not.
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
    except RuntimeError as error:  # REFRAG_KERNELS_ISA names one that this machine can't run
        instructions = f"none: {error}"
    architectures = ", ".join(f"sm_{name.strip()}" for name in torch.ops.refrag_cuda.architectures().split(",") if name)
    return {
        "_planner": planner,
        "_C": "loaded",
        "cpu kernels": instructions,
        "cuda kernels": architectures or f"none: {extension.NO_CUDA}",
    }


def _without_paths(text: str) -> str:
    """Return ``text`` with the last part of each absolute path only: folders may name the machine's owner."""
    return re.sub(r"(?<![\w.])(?:/[^\s/:'\",;]+)+/([^\s/:'\",;]+)", r"\1", text)
