#!/usr/bin/env bash
# Unpacks Debian's etcd into a directory, without installing it. The tests of the shared registry use it.
#   etcd.sh DIRECTORY
exec "$(dirname "$0")/unpack.sh" "$1" etcd-server
