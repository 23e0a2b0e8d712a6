"""What GPUs can do by their data sheets, and which one this machine has.

Invariant: every number is of the vendor's data sheet or white paper; of an unknown card nothing is
known until the user says it.
"""

import os
import subprocess
from dataclasses import dataclass, replace

from llama_lib.flops import peak_tflops

GIB = 2**30

# nvidia-smi answers in some 0.1 s where a driver is loaded and in seconds where it has to wake one.
SMI_SECONDS = 1.5


@dataclass(frozen=True)
class Gpu:
    """One kind of card. Rates are 1e9 bytes/s in one direction; None: unknown, and left out.

    Attributes:
        name: as torch.cuda.get_device_name and nvidia-smi give it.
        short: how --gpu may name it.
        family: generation, which efficiencies go by.
        memory_gib: what nvidia-smi shows as total, in whole GiB, rounded down.
        tflops: dense peak of fp16 and bf16, of one of them where the card has not both.
        bandwidth: device memory.
        link: to the other GPUs of the host.
        pcie: to the memory of the host.
        network: to GPUs of other hosts, a share of what the vendor's own server of this card has.
    """

    name: str
    short: str
    family: str
    memory_gib: float
    tflops: float | None
    bandwidth: float | None
    link: float | None
    pcie: float | None
    network: float | None


def _gpu(
    name: str,
    short: str,
    family: str,
    memory_gib: float,
    bandwidth: float,
    link: float,
    pcie: float,
    network: float | None = None,
) -> Gpu:
    tflops = peak_tflops(name, "bf16") or peak_tflops(name, "fp16")
    return Gpu(name, short, family, memory_gib, tflops, bandwidth, link, pcie, network)


# PCI Express x16 in one direction: 16 GB/s in generation 3, 32 in 4, 64 in 5.
_PCIE3, _PCIE4, _PCIE5 = 16.0, 32.0, 64.0

# Cards without NVLink between all GPUs of a host talk over PCI Express. NVLink is given in both
# directions together on data sheets, here in one.
_CARDS = (
    # V100 data sheet: 900 GB/s, NVLink 300 GB/s. DGX-1: 8 GPUs, 4 x 100 Gb/s.
    _gpu("Tesla V100-SXM2-16GB", "v100-16gb", "volta", 15, 900, 150, _PCIE3, 6.25),
    _gpu("Tesla V100-SXM2-32GB", "v100-32gb", "volta", 31, 900, 150, _PCIE3, 6.25),
    # A100 data sheet: 1555, 2039 and 1935 GB/s, NVLink 600 GB/s. DGX A100: 8 GPUs, 8 x 200 Gb/s.
    _gpu("NVIDIA A100-SXM4-40GB", "a100-40gb", "ampere", 39, 1555, 300, _PCIE4, 25),
    _gpu("NVIDIA A100-SXM4-80GB", "a100-80gb", "ampere", 80, 2039, 300, _PCIE4, 25),
    _gpu("NVIDIA A100-PCIE-40GB", "a100-pcie-40gb", "ampere", 39, 1555, _PCIE4, _PCIE4),
    _gpu("NVIDIA A100 80GB PCIe", "a100-pcie-80gb", "ampere", 80, 1935, _PCIE4, _PCIE4),
    # The A800 is an A100 with NVLink of 400 GB/s.
    _gpu("NVIDIA A800-SXM4-80GB", "a800-80gb", "ampere", 80, 2039, 200, _PCIE4, 25),
    # Data sheets of A30, A40, A10, RTX A6000; RTX 3090: GA102 white paper.
    _gpu("NVIDIA A30", "a30", "ampere", 23, 933, _PCIE4, _PCIE4),
    _gpu("NVIDIA A40", "a40", "ampere", 44, 696, _PCIE4, _PCIE4),
    _gpu("NVIDIA A10", "a10", "ampere", 22, 600, _PCIE4, _PCIE4),
    _gpu("NVIDIA RTX A6000", "rtx-a6000", "ampere", 47, 768, _PCIE4, _PCIE4),
    _gpu("NVIDIA GeForce RTX 3090", "rtx-3090", "ampere", 24, 936, _PCIE4, _PCIE4),
    # H100 data sheet: 3350 and 2000 GB/s, NVLink 900 GB/s. DGX H100 and H200: 8 x 400 Gb/s.
    _gpu("NVIDIA H100 80GB HBM3", "h100", "hopper", 79, 3350, 450, _PCIE5, 50),
    _gpu("NVIDIA H100 PCIe", "h100-pcie", "hopper", 79, 2000, _PCIE5, _PCIE5),
    # H200 data sheet: 4800 GB/s.
    _gpu("NVIDIA H200", "h200", "hopper", 140, 4800, 450, _PCIE5, 50),
    # The H800 is an H100 with NVLink of 400 GB/s.
    _gpu("NVIDIA H800", "h800", "hopper", 79, 3350, 200, _PCIE5, 50),
    # Data sheets of L40S, L40, L4; RTX 4090: Ada white paper.
    _gpu("NVIDIA L40S", "l40s", "ada", 44, 864, _PCIE4, _PCIE4),
    _gpu("NVIDIA L40", "l40", "ada", 44, 864, _PCIE4, _PCIE4),
    _gpu("NVIDIA L4", "l4", "ada", 22, 300, _PCIE4, _PCIE4),
    _gpu("NVIDIA GeForce RTX 4090", "rtx-4090", "ada", 23, 1008, _PCIE4, _PCIE4),
    # DGX B200 data sheet: 8 GPUs with 1,440 GB at 64 TB/s, NVLink 14.4 TB/s, 8 x 400 Gb/s.
    _gpu("NVIDIA B200", "b200", "blackwell", 179, 8000, 900, _PCIE5, 50),
)
GPUS = {card.name: card for card in _CARDS}

# Whose speed is shown when only --gpu_memory says what the cards are, by its GiB; said in the plan.
_BY_MEMORY = {
    16: "v100-16gb",
    24: "rtx-3090",
    32: "v100-32gb",
    40: "a100-40gb",
    48: "a40",
    80: "a100-80gb",
    140: "h200",
    141: "h200",
    180: "b200",
}


def known_gpu(name: str) -> Gpu | None:
    """The card of a device name or of a short name, in any case; None: not in the table."""
    wanted = name.strip().lower().replace(" ", "-")
    for card in _CARDS:
        if wanted in (card.short, card.name.lower().replace(" ", "-")):
            return card
    return None


def gpu_of_memory(gib: float) -> Gpu | None:
    """The card that stands for all of its memory size; None: no card of the table has it."""
    short = _BY_MEMORY.get(round(gib))
    return None if short is None else known_gpu(short)


def unknown_gpu_message(name: str) -> str:
    return (
        f"--gpu {name}: not in the table; expected one of "
        f"{', '.join(card.short for card in _CARDS)}, or give the card's numbers: --gpu_memory "
        "GiB, --peak_tflops X, --memory_bandwidth GB/s"
    )


def custom_gpu(name: str, memory_gib: float, tflops: float | None, bandwidth: float | None) -> Gpu:
    """A card the table lacks, by what the user says of it; links are unknown."""
    return Gpu(name, name, "unknown", memory_gib, tflops, bandwidth, None, None, None)


def without_speed(name: str, memory_gib: float) -> Gpu:
    """A device of which only the memory is known, as a process on a CPU."""
    return custom_gpu(name, memory_gib, None, None)


@dataclass(frozen=True)
class Machines:
    """The hosts of a run.

    Attributes:
        capacity: bytes of memory of one GPU.
        network: 1e9 bytes/s one host sends to the others; None: unknown.
        notes: what was taken without being asked for, one line each.
        shared_memory: the processes compute on CPUs: device and host memory are one.
    """

    gpu: Gpu
    gpus_per_host: int
    capacity: int
    network: float | None
    notes: tuple[str, ...] = ()
    shared_memory: bool = False

    def spanning(self, world_size: int) -> int:
        """Hosts that so many processes need."""
        return -(-world_size // self.gpus_per_host)


def machines(
    gpu: Gpu,
    gpus_per_host: int,
    memory_gib: float | None = None,
    network: float | None = None,
    notes: tuple[str, ...] = (),
) -> Machines:
    """Hosts of `gpus_per_host` such cards; what is not given is the card's own.

    Args:
        network: 1e9 bytes/s of one host; None: gpus_per_host times the card's share.
    """
    if network is None and gpu.network is not None:
        network = gpu.network * gpus_per_host
    capacity = int((memory_gib or gpu.memory_gib) * GIB)
    return Machines(gpu, gpus_per_host, capacity, network, notes)


def cpu_host(memory: int, processes: int) -> Machines:
    """A host without GPUs: its processes compute on CPUs and share its bytes of memory."""
    cpu = without_speed("CPU", memory / GIB)
    return Machines(cpu, processes, memory, None, shared_memory=True)


@dataclass(frozen=True)
class HostGpu:
    """The GPUs of this machine: name and MiB of the first, and how many there are."""

    name: str
    memory_mib: int
    count: int


def host_gpu() -> HostGpu | None:
    """What nvidia-smi says of this machine; None where there is no GPU or no answer."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(
            query, capture_output=True, text=True, timeout=SMI_SECONDS, check=True
        ).stdout
        lines = [line for line in answer.splitlines() if line.strip()]
        name, memory = lines[0].rsplit(",", 1)
        return HostGpu(name.strip(), int(memory), len(lines))
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None


def of_host(found: HostGpu) -> Gpu:
    """The card nvidia-smi found, with the memory it has here; without a speed if unknown."""
    known = known_gpu(found.name)
    gib = found.memory_mib / 1024
    return without_speed(found.name, gib) if known is None else replace(known, memory_gib=gib)


def host_memory() -> int:
    """Bytes of memory of this machine, or of the container if that may use less."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        with open("/sys/fs/cgroup/memory.max") as file:
            return min(total, int(file.read()))
    except (OSError, ValueError):  # no such file, or "max"
        return total
