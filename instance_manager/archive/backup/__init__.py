"""Base backups: taking, listing, checking, keeping and removing them. docs/archive.md tells the rules."""
