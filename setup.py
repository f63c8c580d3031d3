"""Build the two extension modules: write build.ninja, run ninja, copy the results.

refrag_kernels/_C.so           csrc/*.cpp, csrc/cpu, csrc/cuda: torch ops (LibTorch stable ABI, no Python symbols)
refrag_kernels/_planner.*.so   csrc/planner: the planner (pybind11)

Sources are found by folder, so a new file needs no entry here. Each file of csrc/cpu/kernels is compiled once for every
instruction set in ISAS, and csrc/cuda/*.cu only if nvcc is found.

Environment: CXX, CXXFLAGS, LDFLAGS, MAX_JOBS as usual, and
REFRAG_KERNELS_CUDA         0: build without CUDA; 1: fail without nvcc; unset: build with CUDA if nvcc is found
                            (CUDA_HOME or PATH)
REFRAG_KERNELS_CUDA_ARCHS   compute capabilities, such as "80,90a,120+PTX"; "release" for those of a release;
                            default "80,90+PTX"
REFRAG_KERNELS_SANITIZE     sanitizers for the C++ code, such as "address,undefined"
"""

from __future__ import annotations

import dataclasses
import filecmp
import importlib.metadata
import importlib.util
import os
import platform
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent

# The stable ABI to build for is that of the build's torch, but at most 2.13, the newest that csrc needs (for
# Stream::nativeHandle, which csrc/cuda/launch.h avoids in older releases). The result also runs in later releases.
OLDEST_TORCH, TARGET_TORCH = (2, 11), (2, 13)

# The triton release that each torch release requires; torch's CPU wheels don't declare it.
TRITON = {"2.11": "triton==3.6.0", "2.13": "triton==3.7.1", "2.14": "triton~=3.8.0"}

# Device code for each, and PTX of the newest for later GPUs. Uses runpy, since importing the package imports torch.
RELEASE_ARCHS = runpy.run_path(str(ROOT / "refrag_kernels" / "architectures.py"))["release_archs"]()

_AVX512 = "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c"
ISAS = {"portable": ""}
if platform.machine() in ("x86_64", "AMD64"):
    ISAS |= {"avx2": "-mavx2 -mfma -mf16c", "avx512": _AVX512, "avx512_bf16": f"{_AVX512} -mavx512bf16"}


@dataclasses.dataclass(frozen=True)
class Cuda:
    """A CUDA toolkit, and the architectures to compile for."""

    nvcc: str
    cudart: Path  # the static runtime, so that the library depends on no particular CUDA runtime
    archs: str

    @staticmethod
    def find() -> Cuda | None:
        """Return the toolkit to use, or None to build without CUDA."""
        wanted = os.environ.get("REFRAG_KERNELS_CUDA", "")
        if wanted == "0":
            return None
        home = os.environ.get("CUDA_HOME")
        nvcc = shutil.which(f"{home}/bin/nvcc" if home else "nvcc")
        cudart = None
        if nvcc:
            # Get the toolkit's folder from nvcc itself: the nvcc on PATH may be a link or a wrapper script.
            dryrun = subprocess.run([nvcc, "--dryrun", "x.cu"], capture_output=True, text=True, check=False).stderr
            match = re.search(r"^#\$ TOP=(.*)$", dryrun, re.MULTILINE)
            top = Path(match.group(1)) if match else Path(nvcc).resolve().parents[1]
            folders = (f"targets/{platform.machine()}-linux/lib", "lib64", "lib")
            found = (top / folder / "libcudart_static.a" for folder in folders)
            cudart = next((path.resolve() for path in found if path.exists()), None)
        if nvcc is None or cudart is None:
            reason = "it has no libcudart_static.a" if nvcc else "nvcc was not found (CUDA_HOME or PATH)"
            if wanted == "1":
                raise SystemExit(f"REFRAG_KERNELS_CUDA=1, but {reason}")
            print(f"building without CUDA kernels: {reason}")
            return None
        archs = os.environ.get("REFRAG_KERNELS_CUDA_ARCHS", "80,90+PTX")
        return Cuda(nvcc, cudart, RELEASE_ARCHS if archs == "release" else archs)

    def flags(self) -> list[str]:
        """Return nvcc's -gencode flags."""
        flags = []
        for name in self.archs.split(","):
            match = re.fullmatch(r"\s*(\d+[af]?)(\+PTX)?\s*", name)
            if match is None:
                raise SystemExit(f"REFRAG_KERNELS_CUDA_ARCHS: got {name!r}, needs entries such as 80, 90a or 90+PTX")
            arch, ptx = match.groups()
            code = f"[sm_{arch},compute_{arch}]" if ptx else f"sm_{arch}"
            flags += ["-gencode", f"arch=compute_{arch},code={code}"]
        return flags


def package_folder(name: str) -> Path:
    """Return the folder of an installed package without importing it (importing torch takes seconds)."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"building refrag-kernels needs {name} in the environment")
    return Path(spec.submodule_search_locations[0])


def target_torch() -> tuple[int, int]:
    """Return the torch release whose stable ABI to build for."""
    major, minor = importlib.metadata.version("torch").split(".")[:2]
    if (int(major), int(minor)) < OLDEST_TORCH:
        raise SystemExit(f"torch: got {major}.{minor}, building refrag-kernels needs 2.11 or newer")
    return min((int(major), int(minor)), TARGET_TORCH)


class NinjaFile:
    """The text of build.ninja; source and output paths are relative to the repository's root."""

    def __init__(self, build: Path, cuda: Cuda | None, sanitize: str = ""):
        self.build = build
        self.lines = ["ninja_required_version = 1.5", f"builddir = {build}"]
        cxx = shlex.split(os.environ.get("CXX", "c++"))
        torch, python = package_folder("torch"), sysconfig.get_path("include")
        pybind11 = package_folder("pybind11") / "include"
        # With use-after-scope checks, or at -O3, the unrolled kernels take minutes each to compile with sanitizers.
        sanitizers = f"-fsanitize={sanitize} -fno-sanitize-address-use-after-scope -fno-omit-frame-pointer -g".split()
        sanitizers = sanitizers if sanitize else []
        common = ["-std=c++20", "-O1" if sanitize else "-O3", "-Icsrc"]
        # Error messages contain header paths; mapping the folders makes builds reproducible.
        prefixes = [f"-fmacro-prefix-map={folder}/=" for folder in (f"{torch}/include", python, pybind11)]
        host = ["-fPIC", "-fvisibility=hidden", "-Wall", *prefixes]
        self.cxx_flags = [*common, *host, "-Wextra", *sanitizers, *shlex.split(os.environ.get("CXXFLAGS", ""))]
        major, minor = target_torch()
        target = f"-DTORCH_TARGET_VERSION=0x{major:02x}{minor:02x}000000000000ULL"
        self.torch_flags = [target, "-isystem", f"{torch}/include"]
        self.nvcc_flags = [*common, "-Xcompiler", ",".join(host), *self.torch_flags, "-DUSE_CUDA"]

        self.rule("cxx", [*cxx, "-MD", "-MF", "$out.d"], "$flags -c $in -o $out", "C++", depfile=True)
        link = [*cxx, "-shared", *sanitizers, "-Wl,--as-needed", "-Wl,--exclude-libs,ALL"]
        self.rule("link", [*link, *shlex.split(os.environ.get("LDFLAGS", ""))], "$in $libs -o $out", "link")
        # libstdc++ first: torch exports some of its symbols too, but not as part of its stable ABI.
        libraries = ["-lstdc++", f"-L{torch}/lib", "-ltorch_cpu"]
        objects = self.host_objects(cuda)
        if cuda:
            ccbin = ["-ccbin", cxx[-1]] if "CXX" in os.environ else []
            nvcc = [cuda.nvcc, *ccbin, "-MD", "-MF", "$out.d"]
            self.rule("nvcc", nvcc, "$flags -c $in -o $out", "CUDA", depfile=True)
            flags = [*self.nvcc_flags, *cuda.flags()]
            objects += [self.compile("nvcc", source, flags) for source in self.sources("cuda/*.cu")]
            libraries += [str(cuda.cudart), "-ldl", "-lpthread", "-lrt"]
        if not sanitize:
            # Reports undefined symbols when linking, not at import. Sanitizer symbols come from the process.
            libraries.append("-Wl,--no-undefined")
        self.link("_C", objects, libraries)
        flags = [*self.cxx_flags, "-isystem", python, "-isystem", str(pybind11)]
        self.link("_planner", [self.compile("cxx", source, flags) for source in self.sources("planner/*.cpp")], [])

    def host_objects(self, cuda: Cuda | None) -> list[str]:
        flags = [*self.cxx_flags, *self.torch_flags]
        archs = [f'-DREFRAG_CUDA_ARCHS="{cuda.archs}"'] if cuda else []
        objects = [self.compile("cxx", source, [*flags, *archs]) for source in self.sources("*.cpp")]
        objects += [self.compile("cxx", source, flags) for source in self.sources("cpu/*.cpp")]
        for source in self.sources("cpu/kernels/*.cpp"):
            for isa, options in ISAS.items():
                isa_flags = [*self.cxx_flags, f"-DREFRAG_ISA={isa}", *options.split()]
                objects.append(self.compile("cxx", source, isa_flags, f".{isa}"))
        return objects

    @staticmethod
    def sources(pattern: str) -> list[Path]:
        return [path.relative_to(ROOT) for path in sorted((ROOT / "csrc").glob(pattern))]

    def rule(self, name: str, command: list[str], arguments: str, description: str, depfile: bool = False) -> None:
        # $out and $in are ninja's; everything else is quoted for the shell.
        words = [word if word.startswith("$out") else self.quote(word) for word in command]
        self.lines += [f"rule {name}", f"  command = {' '.join(words)} {arguments}"]
        self.lines += [f"  description = {description} $out"]
        if depfile:
            self.lines += ["  depfile = $out.d", "  deps = gcc"]

    def compile(self, rule: str, source: Path, flags: list[str], suffix: str = "") -> str:
        output = str(self.build / source) + f"{suffix}.o"
        self.lines += [f"build {output}: {rule} {source}", f"  flags = {' '.join(map(self.quote, flags))}"]
        return output

    def link(self, name: str, objects: list[str], libraries: list[str]) -> None:
        self.lines += [f"build {self.build / name}.so: link {' '.join(objects)}"]
        self.lines += [f"  libs = {' '.join(map(self.quote, libraries))}"]

    @staticmethod
    def quote(word: str) -> str:
        return shlex.quote(word).replace("$", "$$")

    def __str__(self) -> str:
        return "\n".join(self.lines) + "\n"


def replace_if_different(source: Path, target: Path) -> None:
    """Copy ``source`` to ``target`` atomically, so that a process that has ``target`` loaded keeps the old file."""
    if target.exists() and filecmp.cmp(source, target, shallow=False):
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_suffix(".partial")
    shutil.copy2(source, partial)
    os.replace(partial, target)


class BuildExtension(build_ext):
    """Build the extensions with ninja."""

    def build_extensions(self) -> None:
        sanitize = os.environ.get("REFRAG_KERNELS_SANITIZE", "")
        # Objects are reused by later builds, whichever tool started them (setup.py, pip install, pip wheel).
        name = "-".join([sys.implementation.cache_tag, *filter(None, sanitize.split(","))])
        build = Path("build") / name
        text = str(NinjaFile(build, Cuda.find(), sanitize))
        (ROOT / build).mkdir(parents=True, exist_ok=True)
        (ROOT / build / "build.ninja").write_text(text)
        ninja = shutil.which("ninja")
        jobs = os.environ.get("MAX_JOBS") or str(len(os.sched_getaffinity(0)))
        command = [ninja] if ninja else [sys.executable, "-m", "ninja"]
        if subprocess.run([*command, "-f", str(build / "build.ninja"), "-j", jobs], cwd=ROOT, check=False).returncode:
            raise CompileError("ninja failed: the compiler's messages are above")
        for extension in self.extensions:
            built = ROOT / build / f"{extension.name.rpartition('.')[2]}.so"
            replace_if_different(built, Path(self.get_ext_fullpath(extension.name)))

    def copy_extensions_to_source(self) -> None:
        for extension in self.extensions:
            built = Path(self.build_lib, self.get_ext_filename(extension.name))
            replace_if_different(built, ROOT / self.get_ext_filename(extension.name))

    def get_source_files(self) -> list[str]:
        # Files of a source distribution in addition to the packages.
        return [str(path.relative_to(ROOT)) for path in sorted((ROOT / "csrc").rglob("*")) if path.is_file()]

    def get_ext_filename(self, fullname: str) -> str:
        # _C uses no Python symbols: one file serves all Python versions, loaded by torch.ops.load_library.
        if fullname.rpartition(".")[2] == "_C":
            return os.path.join(*fullname.split(".")) + ".so"
        return super().get_ext_filename(fullname)


def requirements() -> list[str]:
    """Return the wheel's requirements: torch, and the triton release of the torch that it is built with."""
    release = ".".join(importlib.metadata.version("torch").split(".")[:2])
    return ["torch>={}.{}".format(*target_torch()), TRITON.get(release, "triton") + '; platform_system == "Linux"']


if __name__ == "__main__":
    setup(
        ext_modules=[Extension("refrag_kernels._C", []), Extension("refrag_kernels._planner", [])],
        cmdclass={"build_ext": BuildExtension},
        install_requires=requirements(),
    )
