#!/bin/sh
# In the system stage, last: take away what an instance never uses, what is a risk, and what would differ between two builds.
set -eu
with_jit=$1

case $with_jit in
yes) ;;
no)
    # Without its provider Postgres just does not compile queries.
    rm -rf /usr/lib/postgresql/*/lib/llvmjit* /usr/lib/postgresql/*/lib/bitcode /usr/lib/*/libLLVM* /usr/lib/llvm-* /usr/lib/*/libz3.so*
    ;;
*)
    echo "trim: WITH_JIT is yes or no, not '$with_jit'" >&2
    exit 2
    ;;
esac

# Documents (not the licences), translations, and locales other than C, which libc has built in.
find /usr/share/doc -type f ! -name copyright -delete
find /usr/share/doc -type l -delete
find /usr/share/doc -type d -empty -delete
rm -rf /usr/share/man/* /usr/share/info/* /usr/share/locale/* /usr/share/i18n /usr/share/lintian /usr/share/postgresql/*/man

# The modules beyond perl-base, which only Debian's management of clusters uses.
rm -rf /usr/share/perl/5.* /usr/lib/*/perl/5.* /usr/lib/*/perl5 /usr/lib/*/libperl.so.5.*

# Debian's own management of clusters, and the key pair that every image would share.
rm -rf /etc/postgresql /etc/postgresql-common /etc/ssl/private/ssl-cert-snakeoil.key /etc/ssl/certs/ssl-cert-snakeoil.pem
find /etc/ssl/certs -xtype l -delete
find /usr/bin /usr/sbin -lname '*/postgresql-common/*' -delete

# No program may gain a user by being started.
find / -xdev -type f -perm /6000 -exec chmod a-s {} +

rm -rf /var/cache/* /var/log/* /var/lib/apt/lists/* /tmp/* /var/tmp/* /root/.cache /root/.gnupg
rm -f /etc/machine-id /var/lib/dbus/machine-id /var/lib/dpkg/*-old /etc/*- /usr/local/sbin/*
find / -xdev -name __pycache__ -path '/usr/lib/python3*' -prune -exec rm -rf {} +
python3 -m compileall -q -f --invalidation-mode unchecked-hash /usr/lib/python3.*/
