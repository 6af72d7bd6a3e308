"""Data: rows become messages or text, then token files, then batches."""
