#!/bin/sh
# restore_command of the instance manager: restore_command.sh %f %p <state directory> [<the archive's client> ...]
#
# Answers "absent" (1) for everything, with two exceptions.
#
# 1. While this server is being promoted to a claimed timeline (rule P4) it answers "present", with an empty file, for each
#    history below the claim that is not in pg_wal already, and Postgres, which takes the first number without a history,
#    takes exactly the claimed one. "Being promoted" is: the file `claim` exists in the state directory and Postgres has
#    consumed the signal file `promote`. A standby that merely looks for newer timelines must not be told of any. A history
#    that is in pg_wal stays the one there: Postgres copies the parent's into the new one, and an empty answer would cut the
#    ancestry off.
# 2. While the agent allows it, by the word `fetch` in the file `archive-allows` of the state directory, and nothing is being
#    promoted, the archive is asked. The word is looked at again at the end: what arrives after a promise is thrown away (P9).
#
# Runs in the data directory. No other program is started but the client: it is asked several times during a promotion.

may_fetch() {
    [ -f "$1/archive-allows" ] || return 1
    read -r word <"$1/archive-allows" || return 1
    [ "$word" = fetch ]
}

if [ ! -f "$3/claim" ]; then
    [ $# -gt 3 ] || exit 1
    may_fetch "$3" || exit 1
    name=$1 path=$2 state=$3
    shift 3
    "$@" fetch standby "$name" "$path" "$state/archive-allows" || exit 1
    may_fetch "$state" && [ ! -f "$state/claim" ] && exit 0
    rm -f "$path"
    exit 1
fi
[ ! -e promote ] || exit 1
case $1 in
[0-9A-F][0-9A-F][0-9A-F][0-9A-F][0-9A-F][0-9A-F][0-9A-F][0-9A-F].history) ;;
*) exit 1 ;;
esac
[ ! -e "pg_wal/$1" ] || exit 1
read -r claim <"$3/claim" || exit 1
case $claim in
'' | *[!0-9]*) exit 1 ;;
esac
[ "$((0x${1%.history}))" -lt "$claim" ] || exit 1
: >"$2" || exit 1
exit 0
