"""The built-in queries: postgres_exporter's families under its names, labels and types, and a few of our own.

`EACH_SCRAPE` are cheap and asked at every scrape, in the database postgres. `NOW_AND_THEN` look at every file of a
database, or at every table; they are asked beside the scrapes, and the last answer is shown. Every object is named with
its schema or found in pg_catalog, which is the session's whole search_path.
"""

from __future__ import annotations

from instance_manager.metrics.queries import Column, MetricQuery, Usage


def _columns(usage: Usage, helps: dict[str, str]) -> tuple[Column, ...]:
    return tuple(Column(name=name, usage=usage, help=help_) for name, help_ in helps.items())


def _labels(*names: str) -> tuple[Column, ...]:
    return tuple(Column(name=name, usage="LABEL") for name in names)


_DATABASE = _labels("datid", "datname")

STAT_DATABASE = MetricQuery(
    name="pg_stat_database",
    sql="SELECT * FROM pg_stat_database",
    columns=(
        *_DATABASE,
        *_columns("GAUGE", {"numbackends": "Backends connected to this database now."}),
        *_columns(
            "COUNTER",
            {
                "xact_commit": "Transactions that have been committed.",
                "xact_rollback": "Transactions that have been rolled back.",
                "blks_read": "Disk blocks read.",
                "blks_hit": "Blocks that were found in the buffer cache.",
                "tup_returned": "Rows returned by queries.",
                "tup_fetched": "Rows fetched by queries.",
                "tup_inserted": "Rows inserted by queries.",
                "tup_updated": "Rows updated by queries.",
                "tup_deleted": "Rows deleted by queries.",
                "conflicts": "Queries cancelled because of conflicts with recovery, on a standby.",
                "temp_files": "Temporary files created by queries.",
                "temp_bytes": "Bytes written to temporary files by queries.",
                "deadlocks": "Deadlocks detected.",
                "blk_read_time": "Milliseconds spent reading blocks of data files (with track_io_timing).",
                "blk_write_time": "Milliseconds spent writing blocks of data files (with track_io_timing).",
                "stats_reset": "When these statistics were last reset, Unix seconds.",
            },
        ),
        *_columns(
            "UNTYPED",
            {
                "checksum_failures": "Data pages whose checksum did not match; NaN without checksums.",
                "checksum_last_failure": "When a checksum last did not match, Unix seconds.",
                "session_time": "Milliseconds spent by sessions.",
                "active_time": "Milliseconds spent executing statements.",
                "idle_in_transaction_time": "Milliseconds spent idle in a transaction.",
                "sessions": "Sessions established.",
                "sessions_abandoned": "Sessions that ended because the connection was lost.",
                "sessions_fatal": "Sessions ended by fatal errors.",
                "sessions_killed": "Sessions ended by an operator.",
            },
        ),
    ),
)

STAT_DATABASE_CONFLICTS = MetricQuery(
    name="pg_stat_database_conflicts",
    sql="SELECT * FROM pg_stat_database_conflicts",
    columns=(
        *_DATABASE,
        *_columns(
            "COUNTER",
            {
                "confl_tablespace": "Queries cancelled because of dropped tablespaces.",
                "confl_lock": "Queries cancelled because of lock timeouts.",
                "confl_snapshot": "Queries cancelled because of old snapshots.",
                "confl_bufferpin": "Queries cancelled because of pinned buffers.",
                "confl_deadlock": "Queries cancelled because of deadlocks.",
            },
        ),
    ),
)

STAT_ACTIVITY = MetricQuery(
    name="pg_stat_activity",
    sql="""
    SELECT d.datname, s.state, coalesce(a.count, 0) AS count, coalesce(a.max_tx_duration, 0) AS max_tx_duration
    FROM pg_database d
    CROSS JOIN (VALUES ('active'), ('idle'), ('idle in transaction'), ('idle in transaction (aborted)'),
                       ('fastpath function call'), ('disabled')) AS s (state)
    LEFT JOIN (
        SELECT datname, state, count(*), max(extract(epoch FROM now() - xact_start))::float8 AS max_tx_duration
        FROM pg_stat_activity GROUP BY datname, state
    ) AS a ON a.datname = d.datname AND a.state = s.state
    """,
    columns=(
        *_labels("datname", "state"),
        *_columns(
            "GAUGE",
            {
                "count": "Connections in this state.",
                "max_tx_duration": "Seconds that the oldest transaction of a connection in this state has run.",
            },
        ),
    ),
)

LOCKS = MetricQuery(
    name="pg_locks",
    sql="""
    SELECT d.datname, m.mode, coalesce(l.count, 0) AS count
    FROM pg_database d
    CROSS JOIN (VALUES ('accesssharelock'), ('rowsharelock'), ('rowexclusivelock'), ('shareupdateexclusivelock'),
                       ('sharelock'), ('sharerowexclusivelock'), ('exclusivelock'), ('accessexclusivelock'),
                       ('sireadlock')) AS m (mode)
    LEFT JOIN (
        SELECT database, lower(mode) AS mode, count(*) FROM pg_locks WHERE database IS NOT NULL GROUP BY 1, 2
    ) AS l ON l.database = d.oid AND l.mode = m.mode
    """,
    columns=(*_labels("datname", "mode"), *_columns("GAUGE", {"count": "Locks held or waited for."})),
)

_BGWRITER_HELP = {
    "checkpoints_timed": "Checkpoints that were due by time.",
    "checkpoints_req": "Checkpoints that were asked for.",
    "checkpoint_write_time": "Milliseconds that checkpoints spent writing.",
    "checkpoint_sync_time": "Milliseconds that checkpoints spent flushing.",
    "buffers_checkpoint": "Buffers written by checkpoints.",
    "buffers_clean": "Buffers written by the background writer.",
    "maxwritten_clean": "Times that the background writer stopped because it had written too many buffers.",
    "buffers_backend": "Buffers written by backends themselves.",
    "buffers_backend_fsync": "Times that a backend had to flush by itself.",
    "buffers_alloc": "Buffers allocated.",
    "stats_reset": "When these statistics were last reset, Unix seconds.",
}
# Since 0.11 the exporter's names end in _total; dashboards of before, the well-known one too, ask for those without.
_BGWRITER_COLUMNS = (
    *(Column(name=n, usage="COUNTER", help=h, metric=f"pg_stat_bgwriter_{n}_total") for n, h in _BGWRITER_HELP.items()),
    *(Column(name=n, usage="COUNTER", help=h, metric=f"pg_stat_bgwriter_{n}") for n, h in _BGWRITER_HELP.items()),
)

STAT_BGWRITER = MetricQuery(
    name="pg_stat_bgwriter", sql="SELECT * FROM pg_stat_bgwriter", columns=_BGWRITER_COLUMNS, below_major=17
)
STAT_BGWRITER_SINCE_17 = MetricQuery(
    name="pg_stat_bgwriter",
    sql="""
    SELECT c.num_timed AS checkpoints_timed, c.num_requested AS checkpoints_req, c.write_time AS checkpoint_write_time,
           c.sync_time AS checkpoint_sync_time, c.buffers_written AS buffers_checkpoint, w.buffers_clean,
           w.maxwritten_clean, i.writes AS buffers_backend, i.fsyncs AS buffers_backend_fsync, w.buffers_alloc,
           w.stats_reset
    FROM pg_stat_checkpointer c, pg_stat_bgwriter w,
         (SELECT sum(writes)::float8 AS writes, sum(fsyncs)::float8 AS fsyncs FROM pg_stat_io
          WHERE backend_type NOT IN ('checkpointer', 'background writer') AND object <> 'wal') AS i
    """,
    columns=_BGWRITER_COLUMNS,
    minimum_major=17,
)

STAT_ARCHIVER = MetricQuery(
    name="pg_stat_archiver",
    sql="SELECT archived_count, failed_count, extract(epoch FROM now() - last_archived_time)::float8 AS last_archive_age "
    "FROM pg_stat_archiver",
    columns=(
        *_columns(
            "COUNTER",
            {
                "archived_count": "Files that archive_command took.",
                "failed_count": "Failed calls of archive_command.",
            },
        ),
        *_columns("GAUGE", {"last_archive_age": "Seconds since archive_command last took a file."}),
    ),
)

STAT_REPLICATION = MetricQuery(
    name="pg_stat_replication",
    sql="""
    SELECT r.application_name, host(r.client_addr) AS client_addr, r.state, coalesce(s.slot_name, '') AS slot_name,
           r.reply_time,
           CASE WHEN NOT pg_is_in_recovery() THEN pg_wal_lsn_diff(pg_current_wal_lsn(), '0/0')::float8 END
               AS pg_current_wal_lsn_bytes,
           CASE WHEN NOT pg_is_in_recovery() THEN pg_wal_lsn_diff(pg_current_wal_lsn(), r.replay_lsn)::float8 END
               AS pg_wal_lsn_diff
    FROM pg_stat_replication r LEFT JOIN pg_replication_slots s ON s.active_pid = r.pid
    """,
    columns=(
        *_labels("application_name", "client_addr", "state", "slot_name"),
        *_columns(
            "GAUGE",
            {
                "pg_current_wal_lsn_bytes": "Position of the log, in bytes.",
                "pg_wal_lsn_diff": "Bytes that this standby has not replayed yet.",
            },
        ),
        *_columns("UNTYPED", {"reply_time": "When the standby last replied, by its own clock, Unix seconds."}),
    ),
)

REPLICATION_SLOTS = MetricQuery(
    name="pg_replication_slots",
    sql="""
    SELECT slot_name, coalesce(database, '') AS database, active,
           pg_wal_lsn_diff(CASE WHEN pg_is_in_recovery() THEN pg_last_wal_replay_lsn() ELSE pg_current_wal_lsn() END,
                           restart_lsn)::float8 AS pg_wal_lsn_diff
    FROM pg_replication_slots
    """,
    columns=(
        *_labels("slot_name", "database"),
        *_columns(
            "GAUGE",
            {"active": "1: somebody streams from it.", "pg_wal_lsn_diff": "Bytes between the slot and the log's end."},
        ),
    ),
)

REPLICATION = MetricQuery(
    name="pg_replication",
    sql="""
    SELECT CASE WHEN NOT pg_is_in_recovery() THEN 0
                ELSE greatest(0, extract(epoch FROM now() - pg_last_xact_replay_timestamp()))::float8 END AS lag,
           CASE WHEN NOT pg_is_in_recovery() OR pg_last_wal_receive_lsn() = pg_last_wal_replay_lsn() THEN 0
                ELSE greatest(0, extract(epoch FROM now() - pg_last_xact_replay_timestamp()))::float8 END AS lag_seconds,
           pg_is_in_recovery() AS is_replica
    """,
    columns=_columns(
        "GAUGE",
        {
            "lag": "Seconds since the last replayed transaction was committed; grows on an idle cluster too.",
            "lag_seconds": "The same, and 0 where everything that was received is replayed.",
            "is_replica": "1: in recovery.",
        },
    ),
)

POSTMASTER = MetricQuery(
    name="pg_postmaster",
    sql="SELECT pg_postmaster_start_time() AS start_time_seconds",
    columns=_columns("GAUGE", {"start_time_seconds": "When the postmaster started, Unix seconds."}),
)

STATIC = MetricQuery(
    name="pg_static",
    sql="""
    SELECT version() AS version,
           v / 10000 || '.' || v % 10000 || '.0' AS short_version, 1 AS static
    FROM (SELECT current_setting('server_version_num')::int AS v) AS n
    """,
    columns=(
        *_labels("version", "short_version"),
        Column(name="static", usage="UNTYPED", help="The version of Postgres, in labels.", metric="pg_static"),
    ),
)

DATABASE_AGE = MetricQuery(
    name="pg_database_wraparound",
    sql="SELECT datname, age(datfrozenxid) AS age_datfrozenxid_seconds, mxid_age(datminmxid) AS age_datminmxid_seconds "
    "FROM pg_database WHERE datallowconn",
    columns=(
        *_labels("datname"),
        *_columns(
            "GAUGE",
            {
                "age_datfrozenxid_seconds": "Age of the oldest transaction id, in transactions (the exporter's name says seconds).",
                "age_datminmxid_seconds": "Age of the oldest multixact id, in multixacts.",
            },
        ),
    ),
)

SLOTS = MetricQuery(
    name="instance_manager_slot",
    sql="""
    SELECT slot_name, slot_type, coalesce(wal_status, 'unreserved') AS wal_status,
           greatest(0, pg_wal_lsn_diff(
               CASE WHEN pg_is_in_recovery() THEN pg_last_wal_replay_lsn() ELSE pg_current_wal_lsn() END,
               restart_lsn))::float8 AS retained_bytes,
           safe_wal_size::float8 AS safe_wal_bytes
    FROM pg_replication_slots
    """,
    columns=(
        *_labels("slot_name", "slot_type", "wal_status"),
        *_columns(
            "GAUGE",
            {
                "retained_bytes": "WAL that this slot keeps on the volume.",
                "safe_wal_bytes": "WAL that can be written until the slot is lost; NaN: no limit, or lost already.",
            },
        ),
    ),
)

WAL_DIRECTORY = MetricQuery(
    name="pg_wal",
    sql="SELECT count(*) AS segments, coalesce(sum(size), 0)::float8 AS size_bytes FROM pg_ls_waldir() "
    "WHERE name ~ '^[0-9A-F]{24}$'",
    columns=_columns("GAUGE", {"segments": "Segments in pg_wal.", "size_bytes": "Their size."}),
)

DATABASE_SIZE = MetricQuery(
    name="pg_database",
    sql="SELECT datname, pg_database_size(oid) AS size_bytes FROM pg_database WHERE datconnlimit <> -2",
    columns=(*_labels("datname"), *_columns("GAUGE", {"size_bytes": "Disk space used by the database."})),
)

_TABLE = _labels("datname", "schemaname", "relname")

STAT_USER_TABLES = MetricQuery(
    name="pg_stat_user_tables",
    sql="""
    SELECT current_database() AS datname, schemaname, relname, seq_scan, seq_tup_read, coalesce(idx_scan, 0) AS idx_scan,
           coalesce(idx_tup_fetch, 0) AS idx_tup_fetch, n_tup_ins, n_tup_upd, n_tup_del, n_tup_hot_upd, n_live_tup,
           n_dead_tup, n_mod_since_analyze,
           coalesce(extract(epoch FROM last_vacuum), 0)::float8 AS last_vacuum,
           coalesce(extract(epoch FROM last_autovacuum), 0)::float8 AS last_autovacuum,
           coalesce(extract(epoch FROM last_analyze), 0)::float8 AS last_analyze,
           coalesce(extract(epoch FROM last_autoanalyze), 0)::float8 AS last_autoanalyze,
           vacuum_count, autovacuum_count, analyze_count, autoanalyze_count
    FROM pg_stat_user_tables
    """,
    columns=(
        *_TABLE,
        *_columns(
            "COUNTER",
            {
                "seq_scan": "Sequential scans.",
                "seq_tup_read": "Live rows fetched by sequential scans.",
                "idx_scan": "Index scans.",
                "idx_tup_fetch": "Live rows fetched by index scans.",
                "n_tup_ins": "Rows inserted.",
                "n_tup_upd": "Rows updated.",
                "n_tup_del": "Rows deleted.",
                "n_tup_hot_upd": "Rows updated without a new index entry.",
                "vacuum_count": "Times vacuumed by hand.",
                "autovacuum_count": "Times vacuumed by autovacuum.",
                "analyze_count": "Times analysed by hand.",
                "autoanalyze_count": "Times analysed by autovacuum.",
            },
        ),
        *_columns(
            "GAUGE",
            {
                "n_live_tup": "Live rows, estimated.",
                "n_dead_tup": "Dead rows, estimated.",
                "n_mod_since_analyze": "Rows changed since it was last analysed, estimated.",
                "last_vacuum": "When it was last vacuumed by hand, Unix seconds; 0: never.",
                "last_autovacuum": "When autovacuum last vacuumed it, Unix seconds; 0: never.",
                "last_analyze": "When it was last analysed by hand, Unix seconds; 0: never.",
                "last_autoanalyze": "When autovacuum last analysed it, Unix seconds; 0: never.",
            },
        ),
    ),
)

STATIO_USER_TABLES = MetricQuery(
    name="pg_statio_user_tables",
    sql="SELECT current_database() AS datname, * FROM pg_statio_user_tables",
    columns=(
        *_TABLE,
        *_columns(
            "COUNTER",
            {
                "heap_blks_read": "Disk blocks read from the table.",
                "heap_blks_hit": "Buffer hits in the table.",
                "idx_blks_read": "Disk blocks read from its indexes.",
                "idx_blks_hit": "Buffer hits in its indexes.",
                "toast_blks_read": "Disk blocks read from its TOAST table.",
                "toast_blks_hit": "Buffer hits in its TOAST table.",
                "tidx_blks_read": "Disk blocks read from its TOAST table's indexes.",
                "tidx_blks_hit": "Buffer hits in its TOAST table's indexes.",
            },
        ),
    ),
)

EACH_SCRAPE = (
    STATIC,
    POSTMASTER,
    REPLICATION,
    STAT_DATABASE,
    STAT_DATABASE_CONFLICTS,
    STAT_ACTIVITY,
    LOCKS,
    STAT_BGWRITER,
    STAT_BGWRITER_SINCE_17,
    STAT_ARCHIVER,
    STAT_REPLICATION,
    REPLICATION_SLOTS,
    DATABASE_AGE,
    SLOTS,
)
NOW_AND_THEN = (DATABASE_SIZE, WAL_DIRECTORY)
EACH_DATABASE = (STAT_USER_TABLES, STATIO_USER_TABLES)
