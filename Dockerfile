# One Postgres instance with its manager as PID 1. `make image` builds it with podman or docker; see image/README.md.
#
# BASE             any Debian bookworm, also one made by debootstrap
# PG_MAJOR         14 to 18
# POSTGRES_SOURCE  pgdg: apt.postgresql.org; debian: what BASE's own archive has (15)
# WITH_JIT         yes keeps LLVM, which is 160 MB for a feature that short queries do not use

ARG BASE=docker.io/library/debian:bookworm-slim

FROM ${BASE} AS debian
ENV DEBIAN_FRONTEND=noninteractive
COPY image/apt-install.sh /usr/local/sbin/apt-install

# The package and what it imports, in a virtual environment that holds no pip.
FROM debian AS package
RUN apt-install binutils python3 python3-pip python3-venv
COPY image/requirements.txt image/build-requirements.txt image/install-package.sh /build/image/
RUN --mount=type=secret,id=certificates sh /build/image/install-package.sh dependencies
COPY pyproject.toml README.md /build/
COPY instance_manager /build/instance_manager
RUN --mount=type=secret,id=certificates sh /build/image/install-package.sh package

FROM debian AS system
ARG PG_MAJOR
ARG POSTGRES_SOURCE=pgdg
ARG WITH_JIT=no
COPY image/install-postgres.sh image/trim.sh /usr/local/sbin/
RUN sh /usr/local/sbin/install-postgres.sh "${PG_MAJOR}" "${POSTGRES_SOURCE}"
RUN sh /usr/local/sbin/trim.sh "${WITH_JIT}"

# From nothing, so that what the stages removed takes no room.
FROM scratch
COPY --from=system / /
COPY --from=package /opt/instance-manager /opt/instance-manager
COPY image/healthcheck.py /opt/instance-manager/healthcheck.py

# build.sh adds the labels that differ from build to build.
LABEL org.opencontainers.image.title="instance-manager" \
      org.opencontainers.image.description="PostgreSQL with its instance manager as PID 1"

ARG PG_MAJOR
# `psql` and `instance-manager status` in the container need no option. The real psql comes before Debian's wrapper.
ENV PATH=/opt/instance-manager/bin:/usr/lib/postgresql/${PG_MAJOR}/bin:/usr/local/bin:/usr/bin:/bin \
    LANG=C.UTF-8 \
    PYTHONDONTWRITEBYTECODE=1 \
    PGHOST=/var/lib/postgresql/instance/socket \
    INSTANCE_MANAGER_SOCKET=/var/lib/postgresql/instance/control.sock

USER 999:999
WORKDIR /var/lib/postgresql
VOLUME /var/lib/postgresql
EXPOSE 5432 8008
STOPSIGNAL SIGTERM
# For podman and docker; Kubernetes has its own probes.
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s --retries=3 \
    CMD ["/opt/instance-manager/bin/python", "-I", "-S", "/opt/instance-manager/healthcheck.py"]
ENTRYPOINT ["instance-manager"]
CMD ["run", "--config", "/etc/instance-manager/instance-manager.yaml"]
