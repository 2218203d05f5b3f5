"""The supervisor: PID 1 of an instance's container, or a subreaper elsewhere.

It starts, reaps and ends two children, the agent and Postgres, and it enforces the write permit: a read-write Postgres
whose permit has run out is killed, whole, without asking anybody. Read `permit.py` (the rule), `fence.py` (the kill), then
`supervisor.py` (the loop). Nothing here uses threads, the network, the data directory, or anything but the standard library.
"""
