"""Recovery from the archive alone: restore a backup, replay the log to a target, and open only when it was reached."""
