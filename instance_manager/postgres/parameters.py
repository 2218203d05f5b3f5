"""Tables of Postgres's parameters: which are ours, which are refused, which are only defaults; each with the reason."""

from __future__ import annotations

from typing import Final

INCLUSION_WORDS: Final = frozenset({"include", "include_if_exists", "include_dir"})
"""Look like parameters in a file, and pull in others."""

MINIMUMS: Final[dict[str, int]] = {"max_wal_senders": 8, "max_replication_slots": 8}
"""What replication itself needs in the smallest cluster; a user may ask for more."""

_ADDRESS = "the instance manager and the members' addresses depend on it; change the instance's configuration"
_ROLE = "the instance manager sets it with the role of the instance"
_PROMISE = "without it an acknowledged write can be lost"
_FILES = "the instance manager decides where the files of the server are"
_DETECTION = "failure detection is timed on it"
_RECOVERY = "the instance manager decides where recovery goes"
_ARCHIVE = "the instance manager owns the archive; configure it there"
_LOG = "the instance manager reads the server's log from the collector's files, and tells it on standard output"
_TLS = "certificates are given in the instance manager's configuration"

FIXED: Final[dict[str, str]] = {
    "listen_addresses": _ADDRESS,
    "port": _ADDRESS,
    "unix_socket_directories": _ADDRESS,
    "unix_socket_group": _ADDRESS,
    "unix_socket_permissions": _ADDRESS,
    "cluster_name": _ROLE,
    "data_directory": _FILES,
    "config_file": _FILES,
    "hba_file": _FILES,
    "ident_file": _FILES,
    "external_pid_file": _FILES,
    "hot_standby": "the agent could not see how far a standby is",
    "fsync": _PROMISE,
    "full_page_writes": _PROMISE,
    "data_sync_retry": "after a failed flush the kernel may have dropped the data: a retry would hide that",
    "wal_log_hints": "pg_rewind needs it where there are no checksums",
    "restart_after_crash": "a restart in place would let clients in before the quorum has caught up (P8)",
    "synchronous_standby_names": "it is the quorum; see durability and synchronous_standbys",
    "primary_conninfo": _ROLE,
    "primary_slot_name": _ROLE,
    "restore_command": _ARCHIVE,
    "archive_mode": _ARCHIVE,
    "archive_command": _ARCHIVE,
    "archive_library": _ARCHIVE,
    "archive_cleanup_command": _ARCHIVE,
    "recovery_end_command": _RECOVERY,
    "recovery_target": _RECOVERY,
    "recovery_target_action": _RECOVERY,
    "recovery_target_inclusive": _RECOVERY,
    "recovery_target_lsn": _RECOVERY,
    "recovery_target_name": _RECOVERY,
    "recovery_target_time": _RECOVERY,
    "recovery_target_timeline": "a standby must follow the newest accepted timeline",
    "recovery_target_xid": _RECOVERY,
    "promote_trigger_file": "a promotion without an election is a second primary",
    "password_encryption": "only SCRAM passwords are accepted",
    "wal_receiver_timeout": _DETECTION,
    "wal_receiver_status_interval": _DETECTION,
    "wal_retrieve_retry_interval": _DETECTION,
    "wal_receiver_create_temp_slot": "voters stream through their own slots only (P7)",
    "idle_replication_slot_timeout": "it would drop the slot of a member that is away",
    "allow_alter_system": "what ALTER SYSTEM sets would beat the instance manager's settings",
    "logging_collector": _LOG,
    "log_destination": _LOG,
    "log_directory": _LOG,
    "log_filename": _LOG,
    "log_file_mode": _LOG,
    "log_rotation_age": _LOG,
    "log_rotation_size": _LOG,
    "log_truncate_on_rotation": _LOG,
    "log_timezone": "the instance manager's lines have their time in UTC",
    "ssl": _TLS,
    "ssl_cert_file": _TLS,
    "ssl_key_file": _TLS,
    "ssl_ca_file": _TLS,
    "ssl_min_protocol_version": _TLS,
}
"""Set by the instance manager, or left at Postgres's default on purpose; refused from users."""

REFUSED: Final[dict[str, str]] = {
    "dynamic_library_path": "a voter keeps walreceivers from starting by it (P2)",
    "recovery_min_apply_delay": "a standby that replays late cannot take over in time",
    "ssl_passphrase_command": "it would run a program at every reload",
    "zero_damaged_pages": "it destroys data silently; it is for a copy, by hand",
    "ignore_checksum_failure": "it returns damaged data as good; it is for a copy, by hand",
    "ignore_invalid_pages": "it goes on after WAL that does not fit; it is for a copy, by hand",
    "ignore_system_indexes": "it is for repairs in single-user mode",
    "allow_system_table_mods": "it is for repairs, in one session",
    "synchronized_standby_slots": "logical walsenders would wait for names that the instance manager changes",
    "post_auth_delay": "it is for developers, and delays the agent's own sessions",
    "pre_auth_delay": "it is for developers, and delays the agent's own sessions",
    "wal_consistency_checking": "it is for developers, and stops a standby",
    "debug_discard_caches": "it is for developers",
    "bonjour": "it announces the server on the network",
    "bonjour_name": "it announces the server on the network",
}
"""Not ours, but of no use in a cluster and dangerous."""

DEFAULTS: Final[dict[str, str | int | bool]] = {
    "wal_level": "replica",
    "synchronous_commit": "on",
    "hot_standby_feedback": True,
    "max_connections": 100,
    "max_prepared_transactions": 0,
    "max_worker_processes": 8,
    "max_locks_per_transaction": 64,
    # pg_rewind failed with 0: "could not find previous WAL record".
    "wal_keep_size": "512MB",
    # Finite: a member that is away for long costs a clone, not the primary's disk.
    "max_slot_wal_keep_size": "10GB",
    "max_standby_streaming_delay": "10s",
    "max_standby_archive_delay": "10s",
    "wal_sender_timeout": "5s",
    "tcp_keepalives_idle": 10,
    "tcp_keepalives_interval": 5,
    "tcp_keepalives_count": 3,
    "tcp_user_timeout": "15s",
    "client_connection_check_interval": "10s",
    "wal_compression": True,
    "log_checkpoints": True,
    "log_lock_waits": True,
    "log_autovacuum_min_duration": "10min",
    "log_line_prefix": "%m [%p] %q%u@%d/%a ",
    "timezone": "UTC",
    "lc_messages": "C",
}
"""What is written unless the user says otherwise."""

HOT_STANDBY_DEFAULTS: Final[dict[str, int]] = {
    "max_connections": 100,
    "max_worker_processes": 8,
    "max_wal_senders": 10,
    "max_prepared_transactions": 0,
    "max_locks_per_transaction": 64,
}
"""Postgres's own, for what a standby must not have less of than its primary."""

RESTART_PARAMETERS: Final = frozenset(
    {
        *HOT_STANDBY_DEFAULTS,
        "archive_mode",
        "autovacuum_freeze_max_age",
        "autovacuum_max_workers",
        "autovacuum_multixact_freeze_max_age",
        "cluster_name",
        "dynamic_shared_memory_type",
        "hot_standby",
        "huge_page_size",
        "huge_pages",
        "jit_provider",
        "listen_addresses",
        "logging_collector",
        "max_files_per_process",
        "max_logical_replication_workers",
        "max_pred_locks_per_transaction",
        "max_replication_slots",
        "min_dynamic_shared_memory",
        "port",
        "recovery_target_timeline",
        "shared_buffers",
        "shared_memory_type",
        "shared_preload_libraries",
        "superuser_reserved_connections",
        "track_activity_query_size",
        "track_commit_timestamp",
        "unix_socket_directories",
        "unix_socket_permissions",
        "wal_buffers",
        "wal_level",
        "wal_log_hints",
    }
)
"""Context `postmaster` in pg_settings of 14 to 18, those that anybody sets."""


def minimums_for(instances: int) -> dict[str, int]:
    """Every other member may hold two walsenders for a while (one half-open), pg_basebackup two, and as many slots."""
    return {name: max(minimum, 2 * instances + 4) for name, minimum in MINIMUMS.items()}
