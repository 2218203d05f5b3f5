#!/bin/sh
# In the build stage: a virtual environment at /opt/instance-manager. Everything from PyPI is a wheel of the pinned hash;
# `package` reaches no index at all. The secret `certificates` is a CA bundle, for networks with a CA of their own.
set -eu
venv=/opt/instance-manager
tools=/opt/build-tools
export PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
[ ! -s /run/secrets/certificates ] || export PIP_CERT=/run/secrets/certificates

install_hashed() {
    python3 -m pip --python "$1/bin/python" install --require-hashes --only-binary :all: -r "$2"
}

case $1 in
dependencies)
    python3 -m venv --without-pip "$venv"
    python3 -m venv --without-pip "$tools"
    install_hashed "$venv" /build/image/requirements.txt
    install_hashed "$tools" /build/image/build-requirements.txt
    # Of AWS's services only the store and what logs in to it: the rest is 27 MB of descriptions.
    find "$venv"/lib/python3*/site-packages/botocore/data -mindepth 1 -maxdepth 1 -type d \
        ! -name s3 ! -name sts ! -name sso ! -name sso-oidc ! -name signin -exec rm -rf {} +
    # zstandard's second back end, which needs cffi, and what a debugger would want to know: another 40 MB.
    rm "$venv"/lib/python3*/site-packages/zstandard/_cffi.cpython-*.so
    find "$venv" -name '*.cpython-*.so' -exec strip --strip-debug {} +
    ;;
package)
    cd /build
    # Without isolation: setuptools is the pinned one of the tools.
    python3 -m pip --python "$tools/bin/python" wheel --no-deps --no-build-isolation --no-index --wheel-dir /build/wheels .
    python3 -m pip --python "$venv/bin/python" install --no-deps --no-index --no-compile /build/wheels/*.whl
    python3 -m pip --python "$venv/bin/python" check
    # The root filesystem is read-only: what is not compiled here is compiled at every start. By hash, not by time, and never looked at again.
    "$venv/bin/python" -m compileall -q -f --invalidation-mode unchecked-hash "$venv/lib"
    ;;
*)
    echo "$0: dependencies or package, not $1" >&2
    exit 2
    ;;
esac
