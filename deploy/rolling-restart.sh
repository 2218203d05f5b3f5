#!/usr/bin/env bash
# Restart every pod of a cluster, one at a time, the primary last: one switchover. A changed template (image, resources) is
# taken up by it.
#     deploy/rolling-restart.sh [CLUSTER] [KUBECTL_OPTIONS...]      such as: pg --namespace postgres
# The next pod goes only when all are ready and every standby is a voter again. $TIMEOUT_S (900) is the patience with one pod; when it
# ends, nothing more is restarted, and the script can be run again once the cluster is whole.
set -euo pipefail

cluster=${1:-pg}
shift || true
kubectl=(kubectl "$@")
timeout_s=${TIMEOUT_S:-900}
readonly prefix=instance-manager.dev

fail() {
    echo "rolling-restart: $*" >&2
    exit 1
}

case $cluster in -*) fail "the cluster's name comes first, then options of kubectl" ;; esac

# One line per pod: name, uid, role, whether it is ready.
pods() {
    "${kubectl[@]}" get pods --selector "$prefix/cluster=$cluster" --output jsonpath='{range .items[*]}{.metadata.name} {.metadata.uid} {.metadata.labels.instance-manager\.dev/role} {.status.conditions[?(@.type=="Ready")].status}{"\n"}{end}'
}

fact() {
    "${kubectl[@]}" get lease "$cluster" --output jsonpath="{.metadata.annotations.instance-manager\.dev/$1}"
}

# Prints what is missing; nothing when the cluster is whole.
missing() {
    local wanted ready primaries voters
    wanted=$("${kubectl[@]}" get statefulset "$cluster" --output jsonpath='{.spec.replicas}')
    ready=$(pods | awk '$NF == "True"' | wc -l)
    primaries=$(pods | awk '$3 == "primary"' | wc -l)
    if [ "$ready" != "$wanted" ]; then
        echo "$ready of $wanted pods are ready"
    elif [ "$primaries" != 1 ]; then
        echo "$primaries pods say that they are primary"
    elif [ "$(fact paused)" = yes ]; then
        echo "failover is paused: instance-manager resume"
    elif [ "$(fact mode)" = synchronous ]; then
        voters=$(fact voters | tr ',' '\n' | grep -cv '^none$' || true)
        [ "$voters" = $((wanted - 1)) ] || echo "$voters of $((wanted - 1)) standbys are voters"
    fi
}

wait_whole() {
    local end=$((SECONDS + timeout_s)) what said=""
    while what=$(missing) && [ -n "$what" ]; do
        [ $SECONDS -lt $end ] || fail "after $timeout_s s: $what"
        [ "$what" = "$said" ] || echo "waiting: $what"
        said=$what
        sleep 1
    done
}

old=$(pods | awk '{ print $2 }')
[ -n "$old" ] || fail "there are no pods with the label $prefix/cluster=$cluster"
while true; do
    wait_whole
    # Asked anew each time, because the primary may have moved: standbys first, from the highest number down.
    left=$(pods | grep -F "$old" | sort --version-sort --reverse || true)
    next=$(echo "$left" | awk '$3 != "primary" && !found { print $1; found = 1 }')
    [ -n "$next" ] || next=$(echo "$left" | awk '!found { print $1; found = 1 }')
    [ -n "$next" ] || break
    echo "restarting $next"
    "${kubectl[@]}" delete pod "$next" --wait=true --timeout="${timeout_s}s"
done
echo "done: every pod was restarted, and the cluster is whole"
