"""What accelerators can do by their vendors' published numbers, of one device, dense bfloat16."""

import dataclasses
import re


@dataclasses.dataclass(frozen=True)
class Chip:
  """One device. Rates are peaks: what of them can be had, `roofline` says."""

  name: str
  kinds: tuple[str, ...]  # words of JAX's `device_kind` that mean it
  flops: float  # dense bfloat16 a second
  bandwidth: float  # bytes a second of its memory
  memory: float  # bytes, as driver or compiler report them: data sheets round
  link: float  # bytes a second to devices of its host or slice, in one direction, all its links together
  network: float  # bytes a second to other hosts or slices, in one direction
  kernel: float = 2e-6  # seconds that each of many small kernels takes besides what it moves: an H200's in a CUDA graph
  overlaps: bool = True  # it multiplies what is there while it reads what is next


GIB, GB, TB, TFLOPS = 2**30, 1e9, 1e12, 1e12
# The network is not the card's: of NVIDIA's own eight-card systems, one port a card, where there is one.
_NDR, _HDR, _ETHERNET = 50 * GB, 25 * GB, 12.5 * GB  # 400, 200 and 100 Gbit/s

CHIPS = (
  # NVIDIA H100 Tensor Core GPU data sheet: half of what it says with sparsity; NVLink 900 GB/s both ways together.
  # DGX H100 data sheet: eight ports of 400 Gbit/s.
  Chip("H100 PCIe", ("H100 PCIe",), 756 * TFLOPS, 2.0 * TB, 79.1 * GIB, 64 * GB, _HDR),  # link: PCIe 5.0 × 16
  Chip("H100 NVL", ("H100 NVL",), 835 * TFLOPS, 3.9 * TB, 93.1 * GIB, 64 * GB, _HDR),  # bridges join two cards only
  Chip("H100 SXM", ("H100",), 989 * TFLOPS, 3.35 * TB, 79.18 * GIB, 450 * GB, _NDR),
  # NVIDIA H200 Tensor Core GPU data sheet, DGX H200 data sheet; of NVL, bridges join two or four cards only.
  Chip("H200 NVL", ("H200 NVL",), 835 * TFLOPS, 4.8 * TB, 139.8 * GIB, 64 * GB, _HDR),
  Chip("H200", ("H200",), 989 * TFLOPS, 4.8 * TB, 139.8 * GIB, 450 * GB, _NDR),
  # NVIDIA DGX B200 data sheet, an eighth: 144 PFLOPS of sparse FP8 are 2.25 of dense BF16 a card; NVLink 14.4 TB/s.
  Chip("B200", ("B200",), 2250 * TFLOPS, 8.0 * TB, 178.3 * GIB, 900 * GB, _NDR),
  # NVIDIA A100 Tensor Core GPU data sheet: NVLink 600 GB/s; DGX A100 data sheet: eight ports of 200 Gbit/s.
  # The PCIe cards: PCIe 4.0 × 16.
  Chip("A100 PCIe 40 GB", ("A100-PCIE-40GB",), 312 * TFLOPS, 1.555 * TB, 39.4 * GIB, 32 * GB, _HDR),
  Chip("A100 PCIe 80 GB", ("A100 80GB PCIe",), 312 * TFLOPS, 1.935 * TB, 79.25 * GIB, 32 * GB, _HDR),
  Chip("A100 40 GB", ("A100-SXM4-40GB",), 312 * TFLOPS, 1.555 * TB, 39.4 * GIB, 300 * GB, _HDR),
  Chip("A100 80 GB", ("A100",), 312 * TFLOPS, 2.039 * TB, 79.25 * GIB, 300 * GB, _HDR),
  # NVIDIA L40S data sheet: PCIe 4.0 × 16, 64 GB/s both ways together.
  Chip("L40S", ("L40S",), 362 * TFLOPS, 0.864 * TB, 44.5 * GIB, 32 * GB, _ETHERNET),
  # Cloud TPU documentation, pages "TPU v4", "TPU v5e", "TPU v5p", "TPU v6e": the links are half of the bidirectional
  # interconnect (of v4, "TPU v4: An Optically Reconfigurable Supercomputer": six links of 50 GB/s), the network a pod's
  # by its chips. Memory is what libtpu 0.0.52 says that a program can have. Of small kernels nothing is known.
  Chip("TPU v4", ("TPU v4",), 275 * TFLOPS, 1.228 * TB, 30.75 * GIB, 300 * GB, 6.25 * GB, 0),
  Chip("TPU v5e", ("TPU v5 lite", "TPU v5e"), 197 * TFLOPS, 0.819 * TB, 15.75 * GIB, 200 * GB, 3.125 * GB, 0),
  Chip("TPU v5p", ("TPU v5p", "TPU v5"), 459 * TFLOPS, 2.765 * TB, 95.73 * GIB, 600 * GB, 6.25 * GB, 0),
  Chip("TPU v6e", ("TPU v6 lite", "TPU v6e"), 918 * TFLOPS, 1.64 * TB, 31.24 * GIB, 400 * GB, 12.5 * GB, 0),
)

# Of a CPU nothing is published that would help: `roofline.measured` has the numbers of this one.
CPU = Chip("CPU", ("cpu",), 1e11, 2e10, 4 * GIB, 1e10, 1e9, kernel=0, overlaps=False)


def find(kind: str) -> Chip | None:
  """The first chip of which a name is in JAX's `device_kind` as whole words: a GH200 is no H200, a part no card."""
  if " MIG " in f"{kind} ":
    return None
  return next((chip for chip in CHIPS if any(_named(name, kind) for name in chip.kinds)), None)


def named(name: str) -> Chip:
  """The chip of this `name`."""
  return next(chip for chip in CHIPS if chip.name == name)


def _named(name: str, kind: str) -> bool:
  return re.search(rf"\b{re.escape(name)}(?!\w| lite)", kind) is not None
