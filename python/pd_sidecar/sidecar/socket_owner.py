"""Checks that a socket belongs to this user's sidecar, before the engine sends or maps anything.

The default folder has a predictable name in /tmp. Another user of the host may have created this folder first.
"""

from __future__ import annotations

import os
import socket
import stat
import struct
from pathlib import Path


def check_folder(path: str) -> None:
    """Checks that no other user can replace the socket at `path`.

    Raises `PermissionError`, which names the folder, its owner, its mode and the cure.
    """
    folder = Path(path).parent
    links = [folder.lstat()]
    if stat.S_ISLNK(links[0].st_mode):
        links.append(folder.stat())
    for found in links:
        trusted = found.st_uid in (0, os.geteuid())
        # A symbolic link has no mode of its own. The sticky bit of root's /tmp prevents users from replacing other
        # users' files.
        open_to_all = not stat.S_ISLNK(found.st_mode) and found.st_mode & 0o022
        sticky = found.st_mode & stat.S_ISVTX and found.st_uid == 0
        if not trusted or (open_to_all and not sticky):
            raise PermissionError(
                f"{folder} belongs to user {found.st_uid} and has mode "
                f"{stat.S_IMODE(found.st_mode):04o}: another user could put a socket of their own "
                f"there, and read and change KV. Make it user {os.geteuid()}'s own (chown, chmod "
                "0700), or name a socket in another folder: PD_SIDECAR_SOCKET for the engine and "
                "the sidecar"
            )


def check_peer(sock: socket.socket, path: str) -> None:
    """Checks that this user or root serves the socket.

    Raises `PermissionError`, which names the other process.
    """
    raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, uid, _ = _CREDENTIALS.unpack(raw)
    if uid not in (0, os.geteuid()):
        raise PermissionError(
            f"{path} is served by process {pid} of user {uid}, which is neither this user "
            f"({os.geteuid()}) nor root: run the sidecar as the engine's user, or name another "
            "socket (PD_SIDECAR_SOCKET)"
        )


_CREDENTIALS = struct.Struct("3i")
