"""The kinds of GPU that a run can be planned for, with their speeds: loads without torch."""

from dataclasses import dataclass

# GPUs of a node: they share NVLink, and each has its own network card.
NODE = 8


@dataclass(frozen=True)
class Device:
    """Speeds that a GPU reaches in practice."""

    memory: float  # usable GiB
    products: float  # bf16 operations a second of a large matrix product
    bandwidth: float  # bytes a second of a copy in its own memory
    fp8_products: float = 1160e12  # FP8 operations a second of a step's products; assumed
    nvlink: float = 400e9  # bytes a second and direction, in a node
    network: float = 45e9  # bytes a second and direction, between nodes
    host: float = 50e9  # bytes a second and direction, to the host's memory
    measured: str = ""  # steps of ours that were measured on one such GPU


# FP8: below the published 1,249 to 1,305 TFLOP/s of cuBLAS with random numbers, as in bf16 a step's products are (0.93).
# The H200's products and bandwidth are measured. The H100 has the same chip; its memory is assumed to reach the same share of
# the published bandwidth (3.35 TB/s; H200: 4.8 TB/s).
DEVICES = {"h200": Device(139.0, 790e12, 4.3e12, measured="8 layers measured"), "h100": Device(79.0, 790e12, 3.0e12)}
