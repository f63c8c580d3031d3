"""GPU architectures that kernels are configured and compiled for: the one table of their limits.

Imports nothing but the standard library: setup.py runs this file by itself.

Sources: CUDA C++ programming guide, table of technical specifications per compute capability; CDNA 3 ISA.
"""

from __future__ import annotations

import dataclasses

KIB = 1 << 10


@dataclasses.dataclass(frozen=True)
class Architecture:
    """What an architecture offers a kernel.

    Attributes
    ----------
    name : str
        ``sm_<capability>``, or the name of AMD's target.
    shared_memory_per_cta, shared_memory_per_sm : int
        Bytes.
    reserved_per_cta : int
        Bytes of shared memory that the system takes from each CTA's share.
    registers_per_sm : int
        32-bit registers.
    warps_per_sm, ctas_per_sm : int
        At most resident at once.
    warp_size : int
        Threads of a warp (a wave of AMD).
    matrix_instruction : str
        What the machine code of a matrix product shows.
    triton : bool
        Whether Triton's kernels have configurations of their own for it.
    cuda : bool
        Whether a release of the CUDA C++ kernels has device code for it.
    """

    name: str
    shared_memory_per_cta: int
    shared_memory_per_sm: int
    reserved_per_cta: int
    registers_per_sm: int
    warps_per_sm: int
    ctas_per_sm: int
    warp_size: int = 32
    matrix_instruction: str = "HMMA"
    triton: bool = True
    cuda: bool = True

    @property
    def capability(self) -> tuple[int, int] | None:
        """The CUDA compute capability, None for AMD's."""
        digits = self.name.removeprefix("sm_")
        return (int(digits[:-1]), int(digits[-1])) if digits != self.name else None

    def resident_ctas(self, registers: int, shared_memory: int, warps: int) -> int:
        """Return the occupancy: how many CTAs of so many warps an SM holds at once.

        ``registers`` are a thread's, handed out to warps in units of 8 a thread; each of the four schedulers has a
        quarter of them, and whole warps. ``shared_memory`` is a CTA's, handed out in units of 128 bytes.
        """
        of_warp = -(-max(registers, 1) // 8) * 8 * self.warp_size
        by_registers = 4 * (self.registers_per_sm // 4 // of_warp) // warps
        of_cta = -(-shared_memory // 128) * 128 + self.reserved_per_cta
        by_shared = self.shared_memory_per_sm // of_cta if of_cta else self.ctas_per_sm
        return min(self.ctas_per_sm, self.warps_per_sm // warps, by_registers, by_shared)


ARCHITECTURES = {
    architecture.name: architecture
    for architecture in (
        Architecture("sm_80", 163 * KIB, 164 * KIB, KIB, 65536, 64, 32),
        Architecture("sm_86", 99 * KIB, 100 * KIB, KIB, 65536, 48, 16),
        Architecture("sm_89", 99 * KIB, 100 * KIB, KIB, 65536, 48, 24, triton=False),
        Architecture("sm_90", 227 * KIB, 228 * KIB, KIB, 65536, 64, 32, matrix_instruction="HGMMA"),
        Architecture("sm_100", 227 * KIB, 228 * KIB, KIB, 65536, 64, 32, matrix_instruction="UTCHMMA"),
        Architecture("sm_120", 99 * KIB, 100 * KIB, KIB, 65536, 48, 24),
        # Four SIMDs of 512 registers a thread and 8 waves each.
        Architecture("gfx942", 64 * KIB, 64 * KIB, 0, 4 * 512 * 64, 32, 32, 64, matrix_instruction="MFMA", cuda=False),
    )
}

# Those that Triton's configurations are chosen for, the oldest first; other devices use the nearest older one.
TRITON = tuple(name for name, architecture in ARCHITECTURES.items() if architecture.triton)
# Those that a release of the CUDA C++ kernels has device code for.
CUDA = tuple(name for name, architecture in ARCHITECTURES.items() if architecture.cuda)


def of_capability(major: int, minor: int) -> str:
    """Return which of ``TRITON`` serves a device of a CUDA compute capability."""
    if major > 10:  # 11.x too: what fits in the memory of sm_120 fits there
        return "sm_120"
    older = [name for name in TRITON if (ARCHITECTURES[name].capability or (99, 0)) <= (major, minor)]
    return older[-1] if older else TRITON[0]


def release_archs() -> str:
    """Return the compute capabilities of a release, as REFRAG_KERNELS_CUDA_ARCHS takes them: the newest with PTX."""
    return ",".join(name.removeprefix("sm_") for name in CUDA) + "+PTX"
