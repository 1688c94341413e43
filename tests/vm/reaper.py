"""Run a program as another user, and collect what it leaves: ``reaper.py UID GID GROUPS PROGRAM``.

libvirt takes a killed QEMU for alive until its parent, which is process 1, has collected it, and not every
container's does so at once.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys

PR_SET_CHILD_SUBREAPER = 36


def main(uid: str, gid: str, groups: str, *command: str) -> None:
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    if os.geteuid() == 0:
        also = [int(group) for group in groups.split(",") if group]
        subprocess.Popen(command, user=int(uid), group=int(gid), extra_groups=also)
    else:
        subprocess.Popen(command)
    try:
        while True:
            os.wait()
    except ChildProcessError:
        pass


if __name__ == "__main__":
    main(*sys.argv[1:])
