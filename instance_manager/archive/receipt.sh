# What archive_command looks at before it starts a client: a receipt for this very file (`archive.receipts`, which says why each
# of these must hold). Sourced with NAME PATH ALLOWS RECEIPTS; ends the shell with 0 where there is one, else does nothing.
# Only what the shell does by itself: another program's start is what this saves.

has_receipt() {
    receipt="$4/$1"
    [ -s "$receipt" ] && [ -f "$2" ] || return 1
    read -r word <"$3" && [ "$word" = push ] || return 1
    read -r pid began <"$receipt" || return 1
    read -r process <"/proc/$pid/stat" || return 1
    # Neither newer nor older, and not that the shell cannot tell.
    [ "$2" -nt "$receipt" ]
    [ $? -eq 1 ] || return 1
    [ "$2" -ot "$receipt" ]
    [ $? -eq 1 ] || return 1
    # From here on by their numbers in proc(5): the state of the process is 3, when it began 22.
    set -- "$1" "$4" ${process##*)}
    [ "${22}" = "$began" ] || return 1
    # Used up; the listener looks further ahead for it.
    true >"$receipt" && echo "$1" 1<>"$2/taken"
}

has_receipt "$@" 2>/dev/null && exit 0
