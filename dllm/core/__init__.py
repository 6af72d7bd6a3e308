"""Pure tensors: schedules, corruption, losses, canvases, reveal rules. No model, no file."""
