"""What a run leaves on disk and survives: its folder, the ledger of what was spent, checkpoints, keys, a stop."""
