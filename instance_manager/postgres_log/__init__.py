"""Postgres's own log: from the files that its log collector writes to lines of the one schema on standard output (docs/logs.md).

The files are the buffer between both: Postgres never waits for whoever reads standard output. Read `records.py` (what a
line becomes), `secrets.py` (what is taken out of it), `files.py` (what is read, and what is deleted), then `relay.py`.
"""
