"""`instance-manager drill`: faults by real processes, a client that remembers every acknowledgement, and a verdict.

`cases.py` holds the faults and their targets, `write_probe.py` and `sampler.py` what the clients see, `history.py` how it is
written down, `checker.py` the judgement as pure functions, `report.py` the table.
"""
