"""What torch.cuda and torch.accelerator answer on a machine with two GPUs; `emulated_cuda` emulates their tensors."""

from __future__ import annotations

import os
import threading
from contextlib import contextmanager
from types import SimpleNamespace

import torch

COUNT = 2
MEMORY = 2 * 2**30
CAPABILITIES = {"hopper": (9, 0), "turing": (7, 5)}  # EMUCUDA_KIND names one; bfloat16 is there from (8, 0) on

_local = threading.local()
_random_states: dict[int, torch.Tensor] = {}


def current_device() -> int:
    """The device of this thread, 0 at first, as in CUDA."""
    return getattr(_local, "device", 0)


def index_of(device=None) -> int:
    """The number of a device, that of the current one where none is given."""
    if device is None or isinstance(device, int):
        return current_device() if device is None or device < 0 else device
    index = torch.device(device).index
    return current_device() if index is None else index


def set_device(device) -> None:
    """Make a device the current one of this thread."""
    index = index_of(device)
    if not 0 <= index < COUNT:
        raise RuntimeError("CUDA error: invalid device ordinal")
    _local.device = index


class Generator(torch._C.Generator):
    """A generator that may say that it is a GPU's."""

    def __new__(cls, device="cpu"):
        self = super().__new__(cls, "cpu")
        gpu = torch.device(device).type == "cuda"
        self.of = torch.device("cuda", index_of(device)) if gpu else torch.device("cpu")
        return self

    device = property(lambda self: self.of)


class Stream:
    """A stream that does everything at once."""

    def __init__(self, device=None, *_, **__):
        self.device = torch.device("cuda", index_of(device))
        self.cuda_stream = self.stream_id = self.device.index

    def nothing(self, *_, **__) -> None:
        """Everything is done already."""

    synchronize = wait_stream = wait_event = record_event = record = wait = nothing

    def query(self) -> bool:
        return True

    def is_capturing(self) -> bool:
        return False


class device_context:
    """`torch.cuda.device`."""

    def __init__(self, device):
        self.index = index_of(device)

    def __enter__(self):
        self.before = current_device()
        set_device(self.index)

    def __exit__(self, *_):
        set_device(self.before)


class device_of(device_context):
    """`torch.cuda.device_of`: the device of a tensor, none for one on the CPU."""

    def __init__(self, tensor):
        self.index = tensor.get_device() if tensor.is_cuda else current_device()


@contextmanager
def stream_context(stream):
    """`torch.cuda.stream`, which makes the stream's device the current one."""
    with device_context(stream.device if stream else None):
        yield


def set_random_state(state: torch.Tensor, device="cuda") -> None:
    """`torch.cuda.set_rng_state`."""
    assert state.device.type == "cpu" and state.dtype == torch.uint8, "a state is a ByteTensor on the CPU"
    _random_states[index_of(device)] = state.clone()


def random_state(device="cuda") -> torch.Tensor:
    """`torch.cuda.get_rng_state`; every device has another."""
    index = index_of(device)
    return _random_states.get(index, torch.full((16,), index, dtype=torch.uint8)).clone()


def emulate_runtime() -> None:
    """Replace torch.cuda and torch.accelerator by those of two GPUs of 2 GiB."""
    major, minor = CAPABILITIES[os.environ.get("EMUCUDA_KIND", "hopper")]
    about = SimpleNamespace(name="Emulated", total_memory=MEMORY, major=major, minor=minor, multi_processor_count=8)
    constants = dict(
        is_available=True, device_count=COUNT, synchronize=None, empty_cache=None, memory_allocated=0,
        memory_reserved=0, max_memory_reserved=1, mem_get_info=(MEMORY, MEMORY), get_memory_info=(MEMORY, MEMORY),
        get_device_name=about.name, is_initialized=True, get_device_properties=about,
        get_device_capability=(major, minor), _is_in_bad_fork=False, is_current_stream_capturing=False,
    )  # fmt: skip
    nothing = "ipc_collect reset_peak_memory_stats manual_seed manual_seed_all init _lazy_init _lazy_call set_stream"
    constants |= dict.fromkeys(nothing.split())
    functions = dict(
        current_device=current_device,
        current_device_index=current_device,
        set_device=set_device,
        set_device_index=set_device,
        current_accelerator=lambda *_, **__: torch.device("cuda"),
        # bfloat16 is emulated by older GPUs, which torch counts as support unless asked not to.
        is_bf16_supported=lambda including_emulation=True: including_emulation or major >= 8,
        max_memory_allocated=lambda device=None: 1 + index_of(device),
        current_stream=Stream,
        default_stream=Stream,
        device_of=device_of,
        get_rng_state=random_state,
        set_rng_state=set_random_state,
        device=device_context,
        device_index=device_context,
        stream=stream_context,
        Stream=Stream,
        Event=Stream,
    )
    functions |= {name: lambda *_, answer=answer, **__: answer for name, answer in constants.items()}
    for name, function in functions.items():
        for module in (torch.cuda, torch.accelerator):
            if hasattr(module, name):
                setattr(module, name, function)
    torch.Stream = Stream
