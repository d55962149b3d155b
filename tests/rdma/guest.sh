#!/bin/bash
# Runs in the emulated machine, as root: makes two RDMA devices and runs pytest. `run.py` starts this script.
#   guest.sh REPOSITORY FOLDER ENVIRONMENT LMCACHE_ENVIRONMENT
# The changes to /etc, /usr and /tmp lie in the machine's memory and end with it.
set -eu
repository=$1 folder=$2 environment=$3 lmcache=$4
# The kernel has no console that QEMU shows: virtme's ports for output need a module that is not loaded this early.
exec >>"$folder/output" 2>&1
trap 'echo "$?" >"$folder/result"' EXIT

export PATH=$folder/bin:$environment/bin:/usr/sbin:/usr/bin:/sbin:/bin
mount -t tmpfs tmpfs /tmp

# virtme mounts the host's files without a cache, and Python then needs minutes for its imports. What does not change while
# the tests run is mounted again, with a cache.
mkdir -p /run/host /run/usr/upper /run/usr/work
mount -t 9p -o ro,trans=virtio,version=9p2000.L,cache=loose,msize=512000 cached /run/host
mount -t overlay -o lowerdir=/run/host/usr,upperdir=/run/usr/upper,workdir=/run/usr/work usr /usr
for path in "$repository/python" "$repository/tests" "$repository/target/debug" "$environment" "$lmcache"; do
  [ ! -d "$path" ] || mount --bind "/run/host/$(realpath "$path")" "$(realpath "$path")"
done

mkdir -p /lib/modules
ln -sfn "$folder/system/lib/modules/$(uname -r)" "/lib/modules/$(uname -r)"
# The kernel itself loads further modules, for example the checksum of SoftRoCE's packets.
echo "$folder/bin/modprobe" >/proc/sys/kernel/modprobe
modprobe -a crc32_generic ib_uverbs rdma_rxe rdma_ucm veth sch_netem

# The two devices are connected by a cable, so that a test can slow or cut it. Both ends have addresses of this machine;
# without these settings the kernel drops packets that come from a cable and have one of its own addresses.
ip link set lo up
ip link add cable0 type veth peer name cable1
for end in 0 1; do
  ip addr add "10.214.7.$((end + 1))/24" dev "cable$end"
  ip link set "cable$end" up
  echo 1 >"/proc/sys/net/ipv4/conf/cable$end/accept_local"
  echo 0 >"/proc/sys/net/ipv4/conf/cable$end/rp_filter"
done
echo 1 >/proc/sys/net/ipv4/conf/all/accept_local
echo 0 >/proc/sys/net/ipv4/conf/all/rp_filter
for end in 0 1; do rdma link add "rxe$end" type rxe netdev "cable$end"; done
ulimit -l unlimited

# Installs the system's libibverbs and its providers, as the packages libibverbs1 and ibverbs-providers do.
for libraries in usr/lib lib; do
  for name in ibverbs nl- efa hns mana mlx; do
    find "$folder/system/$libraries/x86_64-linux-gnu" -maxdepth 1 -name "lib$name*" -exec cp -a {} /usr/lib/x86_64-linux-gnu/ \;
  done
done
cp -a "$folder/system/etc/libibverbs.d" /etc/

echo "emulated machine: $(uname -r), $(nproc) cores, $(awk '/MemTotal/ {print int($2 / 1024)}' /proc/meminfo) MiB, up for $(cut -d. -f1 /proc/uptime) s"
rdma link
cd "$repository"
export PD_TEST_RDMA=1 PD_TEST_LMCACHE_VENV=$lmcache PYTHONDONTWRITEBYTECODE=1
# Otherwise pytest reads the metadata of every package of the environment, which takes minutes here.
export PYTHONUNBUFFERED=1 PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 PD_TEST_SLOWNESS=10
eval "set -- $(cat "$folder/arguments")"
"$environment/bin/python" -m pytest tests/rdma -p pytest_timeout -p no:cacheprovider -s -v "$@"
