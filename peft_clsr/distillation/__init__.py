"""Training: the trainer, its arguments, batches, losses, step budget and callbacks. Teachers are in `teachers`."""
