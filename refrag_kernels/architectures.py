"""GPU architectures that kernels are configured and compiled for: the one table of their limits.

Imports nothing but the standard library: setup.py runs this file by itself.

Sources: CUDA C++ programming guide, table of technical specifications per compute capability; CDNA 3 ISA.
"""

from __future__ import annotations

import dataclasses

KIB = 1 << 10


@dataclasses.dataclass(frozen=True)
class Architecture:
    """The limits of an architecture.

    Attributes
    ----------
    name : str
        ``sm_<capability>``, or AMD's target name.
    shared_memory_per_cta, shared_memory_per_sm : int
        Bytes.
    reserved_per_cta : int
        Bytes of shared memory that the system reserves for each CTA.
    registers_per_sm : int
        32-bit registers.
    warps_per_sm, ctas_per_sm : int
        Maximum number of resident warps and CTAs.
    warp_size : int
        Threads per warp (AMD: wave).
    matrix_instruction : str
        The opcode of matrix products in machine code.
    triton : bool
        Whether the Triton kernels have configurations for it.
    cuda : bool
        Whether releases of the CUDA C++ kernels contain device code for it.
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
        """Return the occupancy: the number of CTAs with ``warps`` warps each that are resident on an SM.

        ``registers`` is per thread and rounded up to a multiple of 8; each of the four schedulers allocates a quarter
        of the registers to whole warps. ``shared_memory`` is per CTA and rounded up to a multiple of 128 bytes.
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

# Architectures with Triton configurations, oldest first; other devices use those of the nearest older one.
TRITON = tuple(name for name, architecture in ARCHITECTURES.items() if architecture.triton)
# Architectures that releases of the CUDA C++ kernels contain device code for.
CUDA = tuple(name for name, architecture in ARCHITECTURES.items() if architecture.cuda)


def of_capability(major: int, minor: int) -> str:
    """Return the name in ``TRITON`` whose configurations a CUDA compute capability uses."""
    if major > 10:  # 11.x too, which has at least the shared memory of sm_120
        return "sm_120"
    older = [name for name in TRITON if (ARCHITECTURES[name].capability or (99, 0)) <= (major, minor)]
    return older[-1] if older else TRITON[0]


def release_archs() -> str:
    """Return the compute capabilities of a release in the form of REFRAG_KERNELS_CUDA_ARCHS; the newest has PTX."""
    return ",".join(name.removeprefix("sm_") for name in CUDA) + "+PTX"
