#!/usr/bin/env bash
# Runs a real Apache Cassandra of one node on loopback: `install` fetches it, `run DIRECTORY PORT STORAGE_PORT [JAVA FLAG...]`
# starts it in the foreground until it is told to end (Ctrl-C), with its data in DIRECTORY. Needs Java 11 or 17, and Maven to install.
set -euo pipefail
cd "$(dirname "$0")/.."
home=.cache/cassandra

install() {
  [ -f $home/.installed ] && return
  command -v java >/dev/null || { echo "Cassandra needs java"; return 1; }
  command -v mvn >/dev/null || { echo "Cassandra is fetched by mvn, which is not at hand"; return 1; }
  mkdir -p $home
  mvn -q -B -f scripts/cassandra/pom.xml dependency:copy-dependencies -DoutputDirectory="$PWD/$home/lib" >$home/mvn.log 2>&1 ||
    { echo "Cassandra could not be fetched ($home/mvn.log says why)"; return 1; }
  touch $home/.installed
}

configuration() {
  cat <<YAML
cluster_name: agent360
num_tokens: 4
allocate_tokens_for_local_replication_factor: 1
partitioner: org.apache.cassandra.dht.Murmur3Partitioner
endpoint_snitch: SimpleSnitch
listen_address: 127.0.0.1
rpc_address: 127.0.0.1
native_transport_port: $2
storage_port: $3
seed_provider:
  - class_name: org.apache.cassandra.locator.SimpleSeedProvider
    parameters: [{seeds: "127.0.0.1:$3"}]
data_file_directories: ["$1/data"]
commitlog_directory: "$1/commitlog"
saved_caches_directory: "$1/saved_caches"
hints_directory: "$1/hints"
cdc_raw_directory: "$1/cdc"
# What was acknowledged is on disk, though the process be killed.
commitlog_sync: batch
commitlog_segment_size: 8MiB
commitlog_disk_access_mode: legacy
# Tests make many small tables.
memtable_allocation_type: unslabbed_heap_buffers
# Tests drop tables and keyspaces: no snapshot of each.
auto_snapshot: false
YAML
}

# Cassandra reaches into the JDK; these are the packages it needs opened to it (its own conf/jvm17-server.options).
opened="java.base/java.io java.base/java.lang java.base/java.lang.module java.base/java.lang.ref java.base/java.lang.reflect
java.base/java.math java.base/java.net java.base/java.nio java.base/java.util java.base/java.util.concurrent
java.base/java.util.concurrent.atomic java.base/jdk.internal.loader java.base/jdk.internal.math java.base/jdk.internal.misc
java.base/jdk.internal.module java.base/jdk.internal.ref java.base/jdk.internal.reflect java.base/jdk.internal.util.jar
java.base/sun.nio.ch java.management.rmi/com.sun.jmx.remote.internal.rmi java.rmi/sun.rmi.registry java.rmi/sun.rmi.server
java.rmi/sun.rmi.transport.tcp java.sql/java.sql jdk.management/com.sun.management.internal"

run() {
  mkdir -p "$1/conf"
  directory="$(cd "$1" && pwd)"
  configuration "$directory" "$2" "$3" >"$directory/conf/cassandra.yaml"
  cp scripts/cassandra/logback.xml "$directory/conf/"
  flags=()
  for package in $opened; do
    flags+=(--add-exports "$package=ALL-UNNAMED" --add-opens "$package=ALL-UNNAMED")
  done
  exec java "${flags[@]}" -Djdk.attach.allowAttachSelf=true -Xms384m -Xmx384m -XX:+ExitOnOutOfMemoryError -XX:TieredStopAtLevel=1 \
    "-Dcassandra.config=file://$directory/conf/cassandra.yaml" "-Dcassandra.storagedir=$directory" \
    -Dcassandra.ring_delay_ms=1 -Dcassandra.skip_wait_for_gossip_to_settle=0 -Dcassandra.superuser_setup_delay_ms=0 \
    "${@:4}" -cp "$directory/conf:$PWD/$home/lib/*" org.apache.cassandra.service.CassandraDaemon
}

case "${1:-}" in
  install) install ;;
  run) install && run "${@:2}" ;;
  *) echo "usage: scripts/cassandra.sh install | run DIRECTORY PORT STORAGE_PORT [JAVA FLAG...]" >&2; exit 2 ;;
esac
