"""Opens a sidecar's GPU memory in the engine's process. Calls CUDA's driver through ctypes.

Torch runs in the same process, and uses the primary context of each device. So this module opens memory in the primary
context only: it makes this context current in the calling thread for the duration of the call. The module itself does
not need torch.
"""

from __future__ import annotations

import ctypes
import uuid
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from pd_sidecar.sidecar.wire import CudaMemory

HANDLE_BYTES = 64
LAZY_ENABLE_PEER_ACCESS = 1


class CudaError(Exception):
    """A call of the driver failed. The text names the call and a possible cure."""

    def __init__(self, call: str, code: int, hint: str = "") -> None:
        super().__init__(f"{call} failed with {code}{hint and ': '}{hint}")
        self.code = code


class _Handle(ctypes.Structure):
    _fields_ = [("reserved", ctypes.c_ubyte * HANDLE_BYTES)]


class Driver:
    """The driver's library. The constructor raises `CudaError` if the library is not installed."""

    def __init__(self) -> None:
        try:
            self._library = ctypes.CDLL("libcuda.so.1")
        except OSError as error:
            raise CudaError("loading libcuda.so.1", 0, str(error)) from error
        self.call("cuInit", 0)

    def call(self, name: str, *arguments: Any, hint: str = "") -> None:
        """Calls a function that returns a `CUresult`. Raises `CudaError`."""
        function: Callable[..., int] = getattr(self._library, name)
        if code := function(*arguments):
            raise CudaError(name, code, hint)

    def uuid(self, ordinal: int) -> str:
        """Returns the GPU's UUID, which is the same in all processes: `GPU-…`."""
        device = self._device(ordinal)
        raw = (ctypes.c_ubyte * 16)()
        self.call("cuDeviceGetUuid", ctypes.byref(raw), device)
        return f"GPU-{uuid.UUID(bytes=bytes(raw))}"

    def ordinal(self, name: str) -> int:
        """Returns the index of the visible GPU with this name. Raises `CudaError`."""
        count = ctypes.c_int()
        self.call("cuDeviceGetCount", ctypes.byref(count))
        names = [self.uuid(i) for i in range(count.value)]
        if name not in names:
            raise CudaError("looking for the sidecar's GPU", 0, f"this process sees only {names}, not {name}")
        return names.index(name)

    def primary(self, ordinal: int) -> Primary:
        """Returns the context that torch works in."""
        return Primary(self, self._device(ordinal))

    def _device(self, ordinal: int) -> ctypes.c_int:
        device = ctypes.c_int()
        self.call("cuDeviceGet", ctypes.byref(device), ordinal)
        return device


class Primary:
    """A device's primary context. The context is current inside the `with` block."""

    def __init__(self, driver: Driver, device: ctypes.c_int) -> None:
        self._driver = driver
        self._device = device
        self._context = ctypes.c_void_p()
        driver.call("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), device)

    def __enter__(self) -> None:
        self._driver.call("cuCtxPushCurrent_v2", self._context)

    def __exit__(self, *_: object) -> None:
        self._driver.call("cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))

    def __del__(self) -> None:
        if self._context:
            self._driver.call("cuDevicePrimaryCtxRelease_v2", self._device)


class OpenedMemory:
    """A sidecar's buffer. The buffer is closed when its last reference is dropped. Every move in flight holds a
    reference.
    """

    def __init__(self, buffer: CudaMemory, driver: Driver | None = None) -> None:
        """Opens the buffer. Raises `CudaError`."""
        self.bytes = buffer.size
        self.address = 0
        if len(buffer.handle) != HANDLE_BYTES:
            text = f"the handle has {len(buffer.handle)} bytes instead of {HANDLE_BYTES}"
            raise CudaError("opening the sidecar's memory", 0, text)
        self._driver = driver or Driver()
        self.ordinal = self._driver.ordinal(buffer.uuid)
        self._context = self._driver.primary(self.ordinal)
        handle = _Handle.from_buffer_copy(buffer.handle)
        address = ctypes.c_uint64()
        with self._context:
            self._driver.call(
                "cuIpcOpenMemHandle_v2",
                ctypes.byref(address),
                handle,
                LAZY_ENABLE_PEER_ACCESS,
                hint="memory of another process cannot be opened; in containers, engine and "
                "sidecar need the same IPC and PID namespace (--ipc=host --pid=host, or those of "
                "one container)",
            )
        self.address = address.value

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        """Describes the whole buffer as bytes, for `torch.as_tensor`."""
        return {
            "shape": (self.bytes,),
            "typestr": "|u1",
            "data": (self.address, False),
            "strides": None,
            "version": 3,
        }

    def __del__(self) -> None:
        if getattr(self, "address", 0):
            with self._context:
                self._driver.call("cuIpcCloseMemHandle", ctypes.c_uint64(self.address))
