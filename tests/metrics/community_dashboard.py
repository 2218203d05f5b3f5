"""What the community's dashboard for postgres_exporter (9628) asks for: the expressions of its panels and variables.

Its labels `release`, `instance` and `datname` are given by variables; here they match anything.
"""

from __future__ import annotations

_D = '{datname=~".+"}'
_BGWRITER = ("buffers_backend", "buffers_alloc", "buffers_backend_fsync", "buffers_checkpoint", "buffers_clean")

QUERIES = (
    "pg_static",
    "pg_postmaster_start_time_seconds * 1000",
    f"sum(pg_stat_database_tup_fetched{_D})",
    f"sum(pg_stat_database_tup_inserted{_D})",
    f"sum(pg_stat_database_tup_updated{_D})",
    "pg_settings_max_connections",
    "avg(rate(process_cpu_seconds_total[5m]) * 1000)",
    "avg(rate(process_resident_memory_bytes[5m]))",
    "avg(rate(process_virtual_memory_bytes[5m]))",
    "process_open_fds",
    "pg_settings_shared_buffers_bytes",
    "pg_settings_effective_cache_size_bytes",
    "pg_settings_maintenance_work_mem_bytes",
    "pg_settings_work_mem_bytes",
    "pg_settings_max_wal_size_bytes",
    "pg_settings_random_page_cost",
    "pg_settings_seq_page_cost",
    "pg_settings_max_worker_processes",
    "pg_settings_max_parallel_workers",
    'pg_stat_activity_count{datname=~".+", state="active"} != 0',
    'pg_stat_activity_count{datname=~".+", state=~"idle|idle in transaction|idle in transaction (aborted)"}',
    f"irate(pg_stat_database_xact_commit{_D}[5m])",
    f"irate(pg_stat_database_xact_rollback{_D}[5m])",
    f"pg_stat_database_tup_fetched{_D} != 0",
    f"pg_stat_database_tup_inserted{_D} != 0",
    f"pg_stat_database_tup_updated{_D} != 0",
    f"pg_stat_database_tup_deleted{_D} != 0",
    f"pg_stat_database_tup_returned{_D} != 0",
    'pg_locks_count{datname=~".+", mode=~".+"} != 0',
    f"pg_stat_database_blks_hit{_D} / (pg_stat_database_blks_read{_D} + pg_stat_database_blks_hit{_D})",
    *(f"irate(pg_stat_bgwriter_{name}[5m])" for name in _BGWRITER),
    f"irate(pg_stat_database_conflicts{_D}[5m])",
    f"irate(pg_stat_database_deadlocks{_D}[5m])",
    f"irate(pg_stat_database_temp_bytes{_D}[5m])",
    "irate(pg_stat_bgwriter_checkpoint_write_time[5m])",
    "irate(pg_stat_bgwriter_checkpoint_sync_time[5m])",
)
