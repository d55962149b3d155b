#!/usr/bin/env bash
# Unpacks Debian's buildah into a directory, without installing it, and the C library as a base of images. The test of
# deploy/Containerfile.programs uses both. buildah needs no daemon.
#   buildah.sh DIRECTORY
set -euo pipefail

unpack=$(cd "$(dirname "$0")" && pwd)/unpack.sh
mkdir -p "$1"
cd "$1"
"$unpack" unpacked buildah golang-github-containers-common golang-github-containers-image libgpgme11 libassuan0 libdevmapper1.02.1
# The smallest base on which the programs run. A public base image would need a registry.
"$unpack" base/root libc6 libgcc-s1
printf 'FROM scratch\nCOPY root/ /\n' >base/Containerfile
cat >buildah <<'END'
#!/bin/sh
# The file system of an image is a plain folder (vfs), so that no kernel module is needed.
here=$(cd "$(dirname "$0")" && pwd)
files=$here/unpacked
export LD_LIBRARY_PATH="$(echo "$files"/usr/lib/*-linux-gnu):$(echo "$files"/lib/*-linux-gnu)"
export CONTAINERS_CONF="$files/usr/share/containers/containers.conf"
exec "$files/usr/bin/buildah" --root "$here/images" --runroot "$here/run" --storage-driver vfs \
  --registries-conf "$files/etc/containers/registries.conf" "$@"
END
chmod +x buildah
