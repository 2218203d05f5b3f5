"""The archive: WAL pushed, streamed and restored by a process of its own (DESIGN.md section 7)."""
