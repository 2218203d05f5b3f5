#!/bin/sh
# Install packages in a stage of the image, and leave no list and no archive behind.
set -eu
apt-get update -q
apt-get install -y -q --no-install-recommends "$@"
apt-get clean
rm -rf /var/lib/apt/lists/*
