#!/usr/bin/env bash
# Unpacks Debian's Redis into a directory, without installing it. The tests of discovery use it.
#   redis.sh DIRECTORY
set -euo pipefail

# redis-tools contains the server's code. The other packages are libraries that a machine may lack.
"$(dirname "$0")/unpack.sh" "$1" redis-tools liblzf1 libjemalloc2 libatomic1
cd "$1"
# One program serves as server and as tools: the name of the started file selects the role.
ln -sf redis-check-rdb usr/bin/redis-server
cat >redis-server <<'EOF'
#!/bin/sh
here=$(dirname "$0")
LD_LIBRARY_PATH=$(echo "$here"/usr/lib/*-linux-gnu) exec "$here/usr/bin/redis-server" "$@"
EOF
chmod +x redis-server
