"""Pure tensors: schedules, corruption, losses, canvases, reveal rules, likelihood designs. No model, no file."""
