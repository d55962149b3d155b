#!/usr/bin/env bash
# Unpacks all that an emulated machine with RDMA needs into a directory, and installs nothing: a kernel, QEMU, virtme-ng,
# and the user-space libraries of RDMA. The packages come from Debian and from PyPI.
#   rdma.sh DIRECTORY
# Exits with 77, after one line that says why, where such a machine is not to be had.
set -euo pipefail

folder=$1
# virtme-ng boots a kernel with this machine's own files as its root.
virtme=virtme-ng==1.42

skip() {
  echo "no emulated machine: $1" >&2
  exit 77
}

[ "$(uname -s) $(uname -m)" = "Linux x86_64" ] || skip "this machine is $(uname -s) $(uname -m), and the packages are for Linux x86_64"
command -v apt-get >/dev/null || skip "the kernel and QEMU come as Debian packages, and this machine has no apt-get"
memory=$(awk '/MemAvailable/ {print int($2 / 1024)}' /proc/meminfo)
[ "$memory" -ge 6000 ] || skip "the machine takes 5 GiB of memory, and only $memory MiB are available"
mkdir -p "$folder"
cd "$folder"
[ ! -e ready ] || exit 0
disk=$(df --output=avail -m . | tail -1)
[ "$disk" -ge 2000 ] || skip "the packages take 2 GB on the disk while they are unpacked, and only $disk MB are free"

kernel=$(apt-cache depends linux-image-amd64 2>/dev/null | sed -n 's/.*Depends: \(linux-image-[0-9].*\)/\1/p' | head -1)
[ -n "$kernel" ] || skip "apt knows no linux-image-amd64: run apt-get update on a Debian machine"

rm -rf debs system bin virtme
mkdir -p debs/partial system bin
# The kernel modules, and what reads and loads them in the machine. The libraries are fetched even if this machine has
# them: the tests copy exactly these files into the emulated machine.
(cd debs && apt-get download "$kernel" busybox-static kmod libkmod2 libibverbs1 ibverbs-providers libnl-3-200 libnl-route-3-200) >debs/log 2>&1 ||
  skip "apt cannot fetch its packages: $(tail -1 debs/log)"
# QEMU needs many libraries. Only those that this machine lacks are fetched.
if ! command -v qemu-system-x86_64 >/dev/null; then
  apt-get -o Dir::Cache::archives="$PWD/debs" -o Debug::NoLocking=1 --download-only --no-install-recommends -y \
    install qemu-system-x86 >debs/log 2>&1 || skip "apt cannot fetch QEMU: $(tail -1 debs/log)"
fi
for package in debs/*.deb; do
  dpkg -x "$package" system
done
rm -r debs

for program in depmod modprobe; do ln -s ../system/bin/kmod "bin/$program"; done
ln -s ../system/bin/busybox bin/busybox
cat >bin/qemu-system-x86_64 <<'END'
#!/bin/sh
system=$(cd "$(dirname "$0")/../system" && pwd)
[ -x "$system/usr/bin/qemu-system-x86_64" ] || exec /usr/bin/qemu-system-x86_64 "$@"
LD_LIBRARY_PATH=$system/usr/lib/x86_64-linux-gnu:$system/lib/x86_64-linux-gnu
export LD_LIBRARY_PATH
exec "$system/usr/bin/qemu-system-x86_64" -L "$system/usr/share/qemu" -L "$system/usr/share/seabios" -L "$system/usr/lib/ipxe/qemu" "$@"
END
chmod +x bin/qemu-system-x86_64
bin/depmod -b system "${kernel#linux-image-}"
bin/qemu-system-x86_64 --version >/dev/null || skip "the fetched QEMU does not run on this machine"

python3 -m venv virtme
virtme/bin/pip install --quiet --disable-pip-version-check "$virtme" || skip "pip cannot fetch $virtme"
touch ready
