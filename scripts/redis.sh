#!/usr/bin/env bash
# Unpacks Debian's Redis into a directory, without installing it: for the tests of discovery.
#   redis.sh DIRECTORY
set -euo pipefail

folder=$1
mkdir -p "$folder"
cd "$folder"
# The server's code is in redis-tools; the others are libraries that a machine may lack.
apt-get download redis-tools liblzf1 libjemalloc2 libatomic1
for package in ./*.deb; do
  dpkg -x "$package" .
done
rm ./*.deb
# It is one program that goes by the name under which it is called.
ln -sf redis-check-rdb usr/bin/redis-server
cat >redis-server <<'EOF'
#!/bin/sh
here=$(dirname "$0")
LD_LIBRARY_PATH=$(echo "$here"/usr/lib/*-linux-gnu) exec "$here/usr/bin/redis-server" "$@"
EOF
chmod +x redis-server
