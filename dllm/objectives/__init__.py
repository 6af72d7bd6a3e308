"""What is trained, one file per objective: how a batch is corrupted on the host, and its loss on the device."""
