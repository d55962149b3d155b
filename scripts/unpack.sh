#!/usr/bin/env bash
# Downloads Debian packages and unpacks them into a directory, without installing them.
#   unpack.sh DIRECTORY PACKAGE...
set -euo pipefail

mkdir -p "$1/packages"
cd "$1"
(cd packages && apt-get download "${@:2}")
for package in packages/*.deb; do
  dpkg -x "$package" .
done
rm -r packages
