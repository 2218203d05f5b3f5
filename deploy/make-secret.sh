#!/bin/sh
# Write the Secret of a cluster, with new random passwords, to standard output:
#     deploy/make-secret.sh | kubectl create -f -
# `create` refuses to replace one that is there. Without an argument it is that of the base, pg-secrets.
set -eu
name=${1:-pg-secrets}

if [ -t 1 ]; then
    echo "$0: not to a terminal: $0 | kubectl create -f -" >&2
    exit 2
fi

random() {
    od -An -N24 -tx1 /dev/urandom | tr -d ' \n'
}

cat <<EOF
apiVersion: v1
kind: Secret
metadata:
  name: $name
type: Opaque
stringData:
  peer_token: "$(random)"
  replication_password: "$(random)"
  application_password: "$(random)"
  monitoring_password: "$(random)"
EOF
