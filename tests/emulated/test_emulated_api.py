"""The Python API on emulated GPUs."""

import gpu_api
import pytest

QUICK = (
    "launch_kernels_beside_the_current_device",
    "launch_programs_on_the_second",
    "leave_the_gpus_alone",
    "choose_types",
    "place_parts_on_different_devices",
    "offload_groups",
    "offload_a_transformer",
)
USES = [name for name, use in vars(gpu_api).items() if getattr(use, "__module__", "") == "gpu_api"]
USES = [name for name in USES if name not in ("loaded", "image_of", "launch_a_program_on", "main")]
LONG = [name for name in USES if name not in QUICK]


@pytest.mark.parametrize("name", QUICK)
def test_use(name, on_gpus, materials):
    on_gpus(["gpu_api", name, materials.quantized], VQDM_SCORING="auto")


@pytest.mark.long
@pytest.mark.parametrize("name", LONG)
def test_every_use(name, on_gpus, materials):
    on_gpus(["gpu_api", name, materials.quantized])


def test_older_gpus_compute_in_float16(on_gpus, materials):
    on_gpus(["gpu_api", "choose_types", materials.quantized], EMUCUDA_KIND="turing")
