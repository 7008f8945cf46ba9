"""Run a command of this checkout on a processor with AMX, where there is none: Linux in Bochs.

    python tools/amx_in_bochs.py --kernel /boot/vmlinuz-6.12-cloud-amd64 --bochs ./bochs -- tools/amx_check.py

CONTRIBUTING.md ("Testing AMX without AMX") says which packages it needs and how Bochs is built. Bochs starts no kernel
by itself, so the image is a CD with ISOLINUX. All else is in the initramfs: this interpreter, the packages that vnnigen
and its tests need, their shared libraries and the checkout, each at its own path, and an init that runs the command and
prints to the serial port, which Bochs writes to a file.
"""

from __future__ import annotations

import argparse
import gzip
import os
import re
import shutil
import stat
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("vnnigen", "pytest", "hypothesis")
#: Parts of the standard library that no command needs, or that are not of it.
UNUSED = re.compile(r"/(test|idlelib|tkinter|lib2to3|ensurepip|turtledemo|site-packages|dist-packages|config-[^/]*)/")

INIT = """#!{python} -S
import ctypes, os, subprocess, termios
libc = ctypes.CDLL(None)
for kind, at in (("devtmpfs", "/dev"), ("proc", "/proc"), ("sysfs", "/sys")):
    os.makedirs(at, exist_ok=True)
    libc.mount(kind.encode(), at.encode(), kind.encode(), 0, None)
tty = os.open("/dev/ttyS0", os.O_RDWR | os.O_NOCTTY)
for fd in (0, 1, 2):
    os.dup2(tty, fd)
flags = next(line for line in open("/proc/cpuinfo") if line.startswith("flags")).split()
print("amx in /proc/cpuinfo:", *(f for f in flags if f.startswith("amx")), flush=True)
code = subprocess.call({command!r}, env={env!r}, cwd={cwd!r})
print("{end}", code, flush=True)
termios.tcdrain(1)
libc.reboot(0x4321FEDC)  # power off
"""
#: Features of the processor that nothing here needs; fewer things for Bochs and Linux to disagree about.
EXCLUDED = "cet,la57,umip,pku,pks,waitpkg,smap,smep,movdiri,movdir64b,uintr,serialize"
END = "bochs-guest-exit"


def distributions(names: tuple[str, ...]) -> dict[str, metadata.Distribution]:
    """The installed distributions that `names` need, optional dependencies aside."""
    found: dict[str, metadata.Distribution] = {}
    queue = list(names)
    while queue:
        name = re.sub(r"[-_.]+", "-", queue.pop()).lower()
        if name in found:
            continue
        try:
            found[name] = metadata.distribution(name)
        except metadata.PackageNotFoundError:  # for another system or Python
            continue
        needs = [r for r in found[name].requires or () if "extra ==" not in r]
        queue += [re.split(r"[^\w.-]", r, maxsplit=1)[0] for r in needs]
    return found


def python_files() -> Iterator[Path]:
    """Interpreter, standard library, packages and the checkout's own modules."""
    yield Path(sys.executable).resolve()
    yield from (f for f in Path(sysconfig.get_path("stdlib")).rglob("*") if not UNUSED.search(str(f)))
    for name, found in distributions(PACKAGES).items():
        if name != "vnnigen":
            yield from (Path(str(found.locate_file(f))) for f in found.files or ())
    for part in ("vnnigen", "tests", "tools", "benchmarks"):
        yield from (ROOT / part).rglob("*")
    yield ROOT / "pyproject.toml"


def shared_libraries(files: set[Path]) -> set[Path]:
    """What the dynamic linker would load for executables and extension modules."""
    binaries = [str(f) for f in files if f.suffix == ".so" or ".so." in f.name or f == Path(sys.executable).resolve()]
    listed = subprocess.run(["ldd", *binaries], capture_output=True, text=True, check=False).stdout
    return {Path(p) for p in re.findall(r"(/\S+) \(0x", listed)}


def cpio_entry(name: str, mode: int, data: bytes, number: int, mtime: int) -> bytes:
    """One file in the "newc" format (Linux, Documentation/driver-api/early-userspace/buffer-format.rst)."""
    path = name.encode() + b"\0"
    fields = (number, mode, 0, 0, 1, mtime, len(data), 0, 0, 0, 0, len(path), 0)
    head = b"070701" + b"".join(b"%08x" % f for f in fields) + path
    return head + b"\0" * (-len(head) % 4) + data + b"\0" * (-len(data) % 4)


def initramfs(command: list[str]) -> bytes:
    """The compressed root file system."""
    files = {f for f in python_files() if f.is_file()}
    packages = {Path(str(d.locate_file(""))).resolve() for d in distributions(PACKAGES).values()}
    paths = os.pathsep.join(map(str, [ROOT, *packages - {ROOT}]))
    env = {
        "PYTHONPATH": paths, "PATH": "/bin", "HOME": "/tmp", "TERM": "dumb", "COLUMNS": "120",
        "VNNIGEN_TUNE": "off", "PYTHONDONTWRITEBYTECODE": "1",
        # OpenBLAS for the processors with AMX uses an instruction that Bochs does not know.
        "OPENBLAS_NUM_THREADS": "1", "OPENBLAS_CORETYPE": "Haswell",
    }  # fmt: skip
    python = str(Path(sys.executable).resolve())
    init = INIT.format(python=python, command=[python, *command], env=env, cwd=str(ROOT), end=END)
    entries: dict[str, tuple[int, bytes, int]] = {
        "init": (stat.S_IFREG | 0o755, init.encode(), 0),
        "tmp": (stat.S_IFDIR | 0o777, b"", 0),
    }
    for file in sorted(files | shared_libraries(files)):
        for parent in reversed(file.parents[:-1]):
            entries.setdefault(str(parent)[1:], (stat.S_IFDIR | 0o755, b"", 0))
        status = file.stat()
        entries[str(file)[1:]] = (stat.S_IFREG | status.st_mode & 0o777, file.read_bytes(), int(status.st_mtime))
    parts = [cpio_entry(n, mode, data, i, t) for i, (n, (mode, data, t)) in enumerate(entries.items(), 1)]
    return gzip.compress(b"".join([*parts, cpio_entry("TRAILER!!!", 0, b"", 0, 0)]), 1)


def make_iso(folder: Path, kernel: Path, share: Path, command: list[str], append: str) -> Path:
    """A CD that boots `kernel`."""
    cd, iso = folder / "cd", folder / "cd.iso"
    cd.mkdir(parents=True, exist_ok=True)
    shutil.copy(share / "lib/ISOLINUX/isolinux.bin", cd)
    shutil.copy(share / "lib/syslinux/modules/bios/ldlinux.c32", cd)
    shutil.copy(kernel, cd / "linux")
    (cd / "initrd").write_bytes(initramfs(command))
    line = f"console=ttyS0 mitigations=off panic=-1 nokaslr {append}"
    (cd / "isolinux.cfg").write_text(f"default a\nlabel a\n kernel linux\n initrd initrd\n append {line}\n")
    boot = ["-b", "isolinux.bin", "-c", "boot.cat", "-no-emul-boot", "-boot-load-size", "4", "-boot-info-table"]
    subprocess.run(["genisoimage", "-quiet", "-o", iso, *boot, cd], check=True)
    return iso


def run(bochs: str, share: Path, folder: Path, iso: Path, cpu: str, cpus: int, display: str, timeout: float) -> int:
    """Run Bochs, copy the serial port to stdout, return the command's exit code."""
    serial, config = folder / "serial.txt", folder / "bochsrc"
    config.write_text(f"""
megs: 1536
cpu: model={cpu}, count={cpus}, ips=50000000, reset_on_triple_fault=0, exclude_features="{EXCLUDED}"
romimage: file={share}/share/bochs/BIOS-bochs-latest
vgaromimage: file={share}/share/vgabios/vgabios.bin
display_library: {display}
ata0-master: type=cdrom, path={iso}, status=inserted
boot: cdrom
com1: enabled=1, mode=file, dev={serial}
clock: sync=none
log: {folder}/bochs.log
panic: action=fatal
""")
    serial.touch()
    end, shown = time.monotonic() + timeout, 0
    with subprocess.Popen([bochs, "-q", "-f", config], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as machine:
        try:
            while time.monotonic() < end:
                alive = machine.poll() is None
                text = serial.read_text(errors="replace")
                sys.stdout.write(text[shown:].replace("\r", ""))
                sys.stdout.flush()
                shown = len(text)
                if found := re.search(rf"{END} (-?\d+)", text):
                    return int(found[1])
                if not alive:
                    break
                time.sleep(0.5)
        finally:
            machine.kill()
    print(f"the guest ended without an exit code; see {folder}/bochs.log")
    return 3


def main() -> int:
    """Build the CD and run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernel", type=Path, required=True, help="a vmlinuz")
    parser.add_argument("--bochs", default="bochs")
    parser.add_argument("--cpu", default="sapphire_rapids", help="see: bochs --help cpu")
    parser.add_argument("--cpus", type=int, default=1)
    parser.add_argument(
        "--share", type=Path, default=Path("/usr"), help="prefix of ISOLINUX, the BIOS and the VGA BIOS"
    )
    parser.add_argument("--display", default="nogui", help="Bochs' display_library")
    parser.add_argument("--append", default="quiet", help="words for the kernel's command line")
    parser.add_argument("--folder", type=Path, help="for the CD and Bochs' log; a temporary one if not given")
    parser.add_argument("--timeout", type=float, default=3600)
    parser.add_argument("command", nargs="+", help="arguments of the interpreter")
    a = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = a.folder or Path(name)
        iso = make_iso(folder, a.kernel, a.share, a.command, a.append)
        return run(a.bochs, a.share, folder, iso, a.cpu, a.cpus, a.display, a.timeout)


if __name__ == "__main__":
    sys.exit(main())
