"""The agent: observe, decide, act (DESIGN.md section 5).

It keeps the Lease, talks to peers and to Postgres, and may crash, hang or be upgraded at any time: what must survive it
is in the Lease, on the volume, or with the supervisor. `agent.py` is the loop; each other module is one duty.
"""
