#!/usr/bin/env bash
# one_node.sh FOLDER COMMAND...: run a command with a Slurm of one node, this machine, from Debian's own packages.
#
# Nothing is installed and nothing outside FOLDER is changed: the packages are unpacked there, and controller, node
# and command live in namespaces of their own (network, mounts, processes), which end with it. For root on Debian 12.
set -euo pipefail

if [ "${1:-}" != --inside ]; then
    [ $# -ge 2 ] || { echo "usage: $0 FOLDER COMMAND..." >&2; exit 2; }
    [ "$(id -u)" = 0 ] || { echo "only root can start a Slurm: run this as root, or on a cluster" >&2; exit 1; }
    folder=$(realpath -m "$1"); shift
    mkdir -p "$folder/packages" "$folder/state" "$folder/spool" "$folder/log"
    if [ ! -d "$folder/unpacked" ]; then
        (cd "$folder/packages" && apt-get --quiet=2 -o APT::Sandbox::User=root download \
            slurmctld slurmd slurm-client slurm-wlm-basic-plugins libhwloc15 libjson-c5 liblua5.1-0 libnuma1)
        for package in "$folder"/packages/*.deb; do dpkg-deb --extract "$package" "$folder/unpacking"; done
        mv "$folder/unpacking" "$folder/unpacked"
    fi
    exec unshare --net --mount --pid --fork --mount-proc --kill-child bash "$0" --inside "$folder" "$@"
fi

folder=$2; shift 2
plugins=$(dirname "$(find "$folder/unpacked/usr/lib" -name auth_none.so)")
json=$(find "$folder/unpacked/lib" -name 'libjson-c.so*' -print -quit)
export LD_LIBRARY_PATH=$plugins:$(dirname "$plugins"):$(dirname "$json")
export PATH=$PATH:$folder/unpacked/usr/bin

# The resolver gives Slurm no address on a machine that has a loopback only: one more address helps
ip link set lo up
ip address add 192.0.2.1/32 dev lo
hostname localhost

# Jobs find the settings in /etc/slurm whatever their environment is; other mounts of /etc do not see it
# (config_overrides lets the node claim more CPUs than there are: these jobs mostly wait for each other)
mount --make-rprivate /
mkdir -p "$folder/etc"
mount -t tmpfs none "$folder/etc"
cp -a /etc/. "$folder/etc"
mkdir -p "$folder/etc/slurm"
cat >"$folder/etc/slurm/slurm.conf" <<END
ClusterName=one
SlurmctldHost=localhost(127.0.0.1)
SlurmUser=root
AuthType=auth/none
CredType=cred/none
PluginDir=$plugins
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/state/controller.pid
SlurmdPidFile=$folder/state/node.pid
SlurmctldLogFile=$folder/log/controller
SlurmdLogFile=$folder/log/node
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
ReturnToService=2
SlurmdParameters=config_overrides
MessageTimeout=60
BatchStartTimeout=60
NodeName=localhost NodeAddr=127.0.0.1 CPUs=8 RealMemory=16000 State=UNKNOWN
PartitionName=all Nodes=localhost Default=YES MaxTime=60 State=UP
END
mount --bind "$folder/etc" /etc

slurmctld=$folder/unpacked/usr/sbin/slurmctld-wlm slurmd=$folder/unpacked/usr/sbin/slurmd-wlm
"$slurmctld" -D -c >"$folder/log/controller.out" 2>&1 &
for _ in $(seq 30); do scontrol ping 2>/dev/null | grep -q UP && break; sleep 1; done
"$slurmd" -D -N localhost -d "$folder/unpacked/usr/sbin/slurmstepd-wlm" >"$folder/log/node.out" 2>&1 &
for _ in $(seq 30); do [ "$(sinfo --noheader --format %T 2>/dev/null)" = idle ] && break; sleep 1; done
[ "$(sinfo --noheader --format %T)" = idle ] || { echo "Slurm did not start; its logs are in $folder/log" >&2; exit 1; }
"$@"
