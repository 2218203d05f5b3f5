"""Instance manager for PostgreSQL: one per instance, PID 1 of its container."""

__version__ = "0.1.0"
