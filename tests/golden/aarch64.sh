#!/usr/bin/env bash
# Merge the quantised bases of grids.py on an emulated aarch64, and compare the digests.
# Usage: aarch64.sh FOLDER [all]; `all`: the golden files of device.sh as well. Needs apt-get with Debian bookworm's sources, dpkg-deb, python3 and pip,
# and the network. Nothing is installed: packages are unpacked below FOLDER, some 400 MB.
# Kernels are compiled under emulation: minutes on an idle machine.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
tree=$(cd "$here/../.." && pwd)
mkdir -p "$1"
cd "$1"
root=$PWD
if [ ! -e ready ]; then
    mkdir -p native debs apt/lists/partial apt/cache/archives/partial system site wheels
    (cd native && apt-get download qemu-user-static && dpkg-deb -x qemu-user-static_*.deb .)
    touch apt/status
    cat >apt.conf <<END
Dir::State "$root/apt";
Dir::State::status "$root/apt/status";
Dir::Cache "$root/apt/cache";
APT::Architecture "arm64";
APT::Architectures {"arm64";};
END
    apt-get -q -c apt.conf update
    (cd debs && apt-get -q -c ../apt.conf download libc6 libgcc-s1 libstdc++6 zlib1g libexpat1 \
        libssl3 libffi8 libbz2-1.0 liblzma5 libsqlite3-0 libuuid1 libcrypt1 \
        python3.11-minimal libpython3.11-minimal libpython3.11-stdlib)
    for package in debs/*.deb; do dpkg-deb -x "$package" system; done
    for platform in manylinux_2_28_aarch64 manylinux_2_27_aarch64 manylinux2014_aarch64; do
        platforms+=(--platform "$platform")
    done
    python3 -m pip download -q --no-deps -d wheels "${platforms[@]}" --only-binary=:all: \
        --python-version 3.11 -c "$tree/constraints.txt" \
        numpy numba llvmlite click rich markdown-it-py mdurl pygments
    for wheel in wheels/*.whl; do python3 -m zipfile -e "$wheel" site; done
    touch ready
fi
mkdir -p bin
cat >bin/emulated <<END
#!/bin/sh
# The machine code is kept beside the packages, not in the source tree.
PYTHONPATH="$tree:$root/site" NUMBA_CACHE_DIR="$root/cache" exec \
    "$root/native/usr/bin/qemu-aarch64-static" -L "$root/system" \
    "$root/system/usr/bin/python3.11" "\$@"
END
printf '#!/bin/sh\nexec "%s/bin/emulated" -m kilodelta "$@"\n' "$root" >bin/kilodelta
chmod +x bin/emulated bin/kilodelta
bin/emulated "$here/grids.py"
if [ "${2:-}" = all ]; then PATH="$root/bin:$PATH" bash "$here/device.sh" "$root/merged"; fi
