"""Owns GPU memory, as a sidecar does: allocates memory with cuMemAlloc and exports its handle.

owner.py BYTES     prints a line of JSON (uuid, handle in hex), then answers each line `sum FROM TO` with the sum of
                   those bytes
"""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent / "python"))

from pd_sidecar.kv.cuda import Driver


def main() -> None:
    size = int(sys.argv[1])
    driver = Driver()
    address = ctypes.c_uint64()
    handle = (ctypes.c_ubyte * 64)()
    with driver.primary(0):
        driver.call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(size))
        driver.call("cuMemsetD8_v2", address, ctypes.c_ubyte(0), ctypes.c_size_t(size))
        driver.call("cuIpcGetMemHandle", ctypes.byref(handle), address)
        print(json.dumps({"uuid": driver.uuid(0), "handle": bytes(handle).hex()}), flush=True)
        for line in sys.stdin:
            start, end = (int(word) for word in line.split()[1:])
            data = ctypes.create_string_buffer(end - start)
            driver.call("cuMemcpyDtoH_v2", data, ctypes.c_uint64(address.value + start), ctypes.c_size_t(end - start))
            print(sum(data.raw), flush=True)


main()
