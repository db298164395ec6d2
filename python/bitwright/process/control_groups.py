"""The control groups that this process is in, by which systems and containers limit what it may take."""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path


def control_groups(controller: str, root: Path = Path("/")) -> Iterator[tuple[Path, bool]]:
    """Yield the folder of each control group that limits this process, with the groups above it.

    Parameters
    ----------
    controller
        What is limited: ``"memory"`` or ``"cpu"``.
    root
        Of the file system.

    Yields
    ------
    tuple of pathlib.Path and bool
        The folder, and whether its files are those of version 1 of the interface.
    """
    with suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, name = line.split(":", 2)
            first = controller in controllers.split(",")
            top = root / "sys/fs/cgroup" / (controllers if first else "")
            if first and not top.is_dir():  # controllers that are mounted together have links, too
                top = top.with_name(controller)
            folder = top / name.lstrip("/")
            # In a container the path may be that of the machine, and only the top be there.
            for group in (folder, *folder.parents):
                yield group, first
                if group == top:
                    break
