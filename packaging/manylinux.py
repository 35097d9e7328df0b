# SPDX-License-Identifier: Apache-2.0
"""What makes a wheel of a newer machine run on manylinux_2_28 (glibc 2.28, GCC 8's libstdc++), and what checks it.

    python packaging/manylinux.py dist/mio_ext-*.whl

Newer glibc moved symbols from libpthread, libdl and librt into libc, under a new version, and newer libstdc++ gave one
of ours a new version too; all still answer to the old ones, which :func:`stubs` has the linker take.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

#: What the libraries take of each, as glibc 2.28 on x86-64 has it: soname -> version -> symbols.
OLD = {
    "libpthread.so.0": {
        "GLIBC_2.2.5": """pthread_condattr_setpshared pthread_create pthread_detach pthread_getspecific pthread_join
            pthread_key_create pthread_key_delete pthread_kill pthread_mutex_trylock pthread_mutexattr_destroy
            pthread_mutexattr_init pthread_mutexattr_setpshared pthread_mutexattr_settype pthread_once
            pthread_rwlock_destroy pthread_rwlock_init pthread_rwlock_rdlock pthread_rwlock_timedrdlock
            pthread_rwlock_timedwrlock pthread_rwlock_tryrdlock pthread_rwlock_trywrlock pthread_rwlock_unlock
            pthread_rwlock_wrlock pthread_rwlockattr_destroy pthread_rwlockattr_init pthread_rwlockattr_setpshared
            pthread_setspecific pthread_spin_destroy pthread_spin_init pthread_spin_lock pthread_spin_trylock
            pthread_spin_unlock sem_destroy sem_init sem_post sem_timedwait sem_trywait sem_wait"""
    },
    "libdl.so.2": {"GLIBC_2.2.5": "dlclose dlerror dlopen dlsym dlvsym", "GLIBC_2.3.4": "dlmopen"},
    "librt.so.1": {"GLIBC_2.2.5": "shm_open shm_unlink"},
    "libstdc++.so.6": {"GLIBCXX_3.4.11": "_ZNSt18condition_variable4waitERSt11unique_lockISt5mutexE"},
}
#: The latest version of each that manylinux_2_28 has, and what a library may need besides torch's own.
LATEST = {"GLIBC": (2, 28), "GLIBCXX": (3, 4, 25), "CXXABI": (1, 3, 11), "GCC": (7, 0, 0)}
TORCH = {"libtorch_cpu.so", "libtorch_cuda.so", "libc10.so"}
SYSTEM = {"libpthread.so.0", "libdl.so.2", "librt.so.1", "libm.so.6", "libc.so.6", "libstdc++.so.6", "libgcc_s.so.1"}
SYSTEM |= {"ld-linux-x86-64.so.2"}


def stubs(folder: Path) -> list[str]:
    """Libraries that name the old versions, made in ``folder``; the options with which the linker takes them first."""
    folder.mkdir(parents=True, exist_ok=True)
    for soname, versions in OLD.items():
        source, script = folder / f"{soname}.c", folder / f"{soname}.map"
        names = [name for symbols in versions.values() for name in symbols.split()]
        source.write_text("".join(f"void {name}(void) {{}}\n" for name in names))
        script.write_text("".join(f"{v} {{ global: {'; '.join(s.split())}; }};\n" for v, s in versions.items()))
        command = ["gcc", "-shared", "-fPIC", "-nostdlib", "-fno-builtin", "-w", f"-Wl,-soname,{soname}"]
        command += [f"-Wl,--version-script={script}", "-o", str(folder / soname), str(source)]
        subprocess.run(command, check=True)
    return [str(folder / soname) for soname in OLD]


def complaints(library: Path) -> list[str]:
    """What of ``library`` manylinux_2_28 does not have."""
    dynamic = subprocess.run(["readelf", "-dW", str(library)], capture_output=True, text=True, check=True).stdout
    needed = set(re.findall(r"\(NEEDED\).*\[(.*)\]", dynamic))
    found = [f"{library.name} needs {name}" for name in sorted(needed - TORCH - SYSTEM)]
    symbols = subprocess.run(["readelf", "--dyn-syms", "-W", str(library)], capture_output=True, text=True, check=True)
    for line in symbols.stdout.splitlines():
        if " UND " not in line:
            continue
        symbol = line.split(" UND ")[1].split()[0] if line.split(" UND ")[1].strip() else ""
        version = re.fullmatch(r".*@([A-Z]+)_([0-9.]+)", symbol)
        if version and tuple(map(int, version[2].split("."))) > LATEST.get(version[1], (0,)):
            found.append(f"{library.name} needs {symbol}")
        if re.search(r"\b_?Py[A-Z_]|^GOMP_|^omp_", symbol):
            found.append(f"{library.name} needs {symbol}")
    return found


def check(wheel: Path) -> list[str]:
    """What is wrong with the libraries of a wheel."""
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(wheel) as archive:
        libraries = [name for name in archive.namelist() if ".so" in name]
        found = [] if "mio_ext/libmio_ext.so" in libraries else [f"{wheel.name} has no libmio_ext.so"]
        found += [f"{wheel.name} has {name}, of one Python" for name in libraries if "cpython" in name]
        for name in libraries:
            found += complaints(Path(archive.extract(name, folder)))
    return found


if __name__ == "__main__":
    for path in map(Path, sys.argv[1:]):
        wrong = check(path)
        print(*wrong, sep="\n", end="\n" if wrong else "")
        print(f"{path.name}: {path.stat().st_size / 1e6:.1f} MB, {'not ' if wrong else ''}manylinux_2_28")
        if wrong:
            sys.exit(1)
