#!/usr/bin/env bash
# Unpacks Debian's etcd into a directory, without installing it. The tests of the shared registry use it.
#   etcd.sh DIRECTORY
set -euo pipefail

folder=$1
mkdir -p "$folder"
cd "$folder"
apt-get download etcd-server
dpkg -x etcd-server_*.deb .
rm etcd-server_*.deb
