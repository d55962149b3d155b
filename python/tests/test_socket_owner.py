"""Tests that the client does not use a socket that another user serves or could replace."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from fake_sidecar import FakeSidecar, refusal

from pd_sidecar.sidecar.socket_owner import check_folder
from pd_sidecar.sidecar.wire import Hello, Layout

LAYOUT = Layout("tiny", "bfloat16", 2, 2, 16, False, 256)
HELLO = Hello(v=1, engine="test", role="prefill", rank=0, world_size=1, layout=LAYOUT)

# A program of another user, which serves a socket at the path of the sidecar's socket.
STRANGER = """
import os, socket, sys
os.setuid(12345)
listener = socket.socket(socket.AF_UNIX)
listener.bind(sys.argv[1])
os.chmod(sys.argv[1], 0o777)
listener.listen()
print("ready", flush=True)
while True:
    connection, _ = listener.accept()
    print(len(connection.recv(1)), flush=True)
"""

root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user as well")


@pytest.mark.parametrize(("mode", "fine"), [(0o700, True), (0o755, True), (0o777, False), (0o770, False)])
def test_a_folder_that_others_can_write_into_is_refused(tmp_path, mode, fine):
    folder = tmp_path / "pd-sidecar-1000"
    folder.mkdir()
    folder.chmod(mode)
    if fine:
        check_folder(str(folder / "sender.sock"))
        return
    with pytest.raises(PermissionError) as error:
        check_folder(str(folder / "sender.sock"))
    assert f"{folder} belongs to user {os.geteuid()} and has mode {mode:04o}" in str(error.value)
    assert "PD_SIDECAR_SOCKET" in str(error.value)


def test_a_connection_is_not_made_in_such_a_folder(tmp_path):
    folder = tmp_path / "pd-sidecar-1000"
    folder.mkdir()
    sidecar = FakeSidecar(folder / "sender.sock", slots=3)
    folder.chmod(0o777)
    assert "has mode 0777" in refusal(sidecar.path, HELLO)
    assert sidecar.hellos == []


@root
def test_a_folder_or_link_of_another_user_is_refused(tmp_path):
    folder = tmp_path / "pd-sidecar-1000"
    folder.mkdir(mode=0o755)
    link = tmp_path / "link"
    link.symlink_to(folder)
    check_folder(str(link / "sender.sock"))
    for at in (link, folder):
        os.chown(at, 12345, 12345, follow_symlinks=False)
        with pytest.raises(PermissionError, match="belongs to user 12345"):
            check_folder(str(at / "sender.sock"))


@root
def test_a_sidecar_of_another_user_is_told_nothing(tmp_path):
    """The folder is like /tmp with the sticky bit: any user may create a socket there before the sidecar does."""
    folder = tmp_path / "sticky"
    folder.mkdir()
    folder.chmod(0o1777)
    for parent in [tmp_path, *tmp_path.parents][:4]:
        parent.chmod(parent.stat().st_mode | 0o011)
    path = str(folder / "sender.sock")
    stranger = subprocess.Popen([sys.executable, "-c", STRANGER, path], stdout=subprocess.PIPE, text=True)
    try:
        assert stranger.stdout.readline() == "ready\n"
        assert "of user 12345, which is neither this user" in refusal(path, HELLO)
        assert stranger.stdout.readline() == "0\n", "it was told something"
    finally:
        stranger.kill()
        stranger.wait()
