"""The processes that decode image files: how many, how many batches each keeps ready, memory."""

import ctypes
import math
import os
import shutil
import sys
from pathlib import Path

# A process takes half a second or more to start, in which it would decode a few hundred images from
# files; fewer than these for each process are decoded sooner by the run itself.
IMAGES_PER_WORKER = 250

SHARED_MEMORY = Path("/dev/shm")
AHEAD = 2  # batches that each process keeps ready, where there is shared memory for them
# Batches that each process holds besides: the one it fills, and the one that is being taken.
HELD = 2

# glibc's malloc.h: M_ARENA_MAX, since only the first arena can grow without limit; M_MMAP_MAX;
# M_TRIM_THRESHOLD; M_TOP_PAD, how many bytes it grows by.
MALLOPT = {-8: 1, -4: 0, -1: 2**31 - 1, -2: 64 << 20}


def num_workers(setting: int, num_images: int) -> int:
    """Returns the number of processes that decode images, for a setting of `data.workers`.

    Args:
      setting: their number; 0 for none beside the run's own; -1 for one per core that this process
        may use, but none that would have fewer than `IMAGES_PER_WORKER` images.
      num_images: how many images are decoded before the processes end.
    """
    return setting if setting >= 0 else min(allowed_cores(), num_images // IMAGES_PER_WORKER)


def allowed_cores() -> int:
    """Returns how many cores this process may use: its affinity, and its container's quota."""
    quota = _quota(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))
    return max(1, math.ceil(min(affinity(), quota)))


def affinity() -> int:
    """Returns how many cores this process may run on; those of the machine where none are set."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1  # macOS


def _quota(cgroup: Path, root: Path) -> float:
    """Returns the cores that Linux's control groups (version 2) allow; infinity without a limit.

    Args:
      cgroup: the file that names this process's groups.
      root: where the groups are mounted; a limit may be that of any group above.
    """
    try:
        lines = cgroup.read_text().splitlines()
    except OSError:
        return math.inf
    limits = [math.inf]
    for path in [line.removeprefix("0::/") for line in lines if line.startswith("0::/")]:
        for group in (Path(path), *Path(path).parents):
            try:
                quota, period = (root / group / "cpu.max").read_text().split()
                limits.append(int(quota) / int(period))  # "max" is no number
            except (OSError, ValueError, ZeroDivisionError):
                pass
    return min(limits)


def fit_shared_memory(workers: int, batch_bytes: int) -> tuple[int, int, str]:
    """Returns how many processes, and batches ahead of each, the free shared memory has room for.

    Containers have 64 MiB of it by default, and a process that finds no room is killed. What a
    batch holds does not depend on either number.

    Args:
      workers: how many processes are wanted.
      batch_bytes: size of a batch.

    Returns:
      The number of processes, 0 to `workers`; the batches that each keeps ready, 1 to `AHEAD`; and
      a sentence if they are fewer than wanted, or else an empty string.
    """
    try:
        size, _, free = shutil.disk_usage(SHARED_MEMORY)
    except OSError:  # not Linux
        return workers, AHEAD, ""
    for count in range(workers, 0, -1):
        for ahead in range(AHEAD, 0, -1):
            # A quarter stays free: others, such as NVIDIA's NCCL, use the same memory.
            if count * (ahead + HELD) * batch_bytes <= 0.75 * free:
                if (count, ahead) == (workers, AHEAD):
                    return count, ahead, ""
                return count, ahead, _less(workers, count, ahead, batch_bytes, size)
    return 0, AHEAD, _less(workers, 0, 0, batch_bytes, size) if workers else ""


def _less(workers: int, count: int, ahead: int, batch_bytes: int, size: int) -> str:
    instead = (
        f"{count} with {ahead} ahead each decode" if count else "the run's own process decodes"
    )
    return (
        f"{SHARED_MEMORY} of {size >> 20} MiB has too little room for {workers} worker processes "
        f"with batches of {batch_bytes / 2**20:.1f} MiB: {instead} images (data.workers; a "
        f"container is given more as by docker run --shm-size=2g)"
    )


def keep_freed_memory() -> None:
    """Lets glibc hand out freed memory again, instead of giving it back to the system.

    Large arrays are mapped and unmapped each time by default, so that every page is first cleared
    by the system. On a CPU that took 37,700 page faults and 23 % of the time of a training step of
    ShiftResNet20 (expansion 1, 128 images, 2 cores); in a process that decodes, 157 page faults and
    18 % of the processor time of an image of 500x375 pixels. The process keeps the most that it
    ever held. `MALLOC_*` variables that the user set stand; other libraries of C are left as they
    are.
    """
    if sys.platform != "linux" or any(name.startswith("MALLOC_") for name in os.environ):
        return
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version"):
        return
    for option, value in MALLOPT.items():
        libc.mallopt(option, value)
