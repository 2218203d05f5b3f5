#!/bin/sh
# restore_command of the instance manager: restore_command.sh %f %p <state directory>
#
# Answers "absent" (1) for everything, except while this server is being promoted to a claimed timeline (rule P4):
# then it answers "present", with an empty file, for each history below the claim that is not in pg_wal already, and
# Postgres, which takes the first number without a history, takes exactly the claimed one.
#
# "Being promoted" is: the file `claim` exists in the state directory and Postgres has consumed the signal file
# `promote`. A standby that merely looks for newer timelines must not be told of any. A history that is in pg_wal
# stays the one there: Postgres copies the parent's into the new one, and an empty answer would cut the ancestry off.
# Runs in the data directory. No other program is started: it is asked several times during a promotion.

[ -f "$3/claim" ] || exit 1
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
