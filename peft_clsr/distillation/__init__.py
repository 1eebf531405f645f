"""Training: the trainer, its losses, arguments and callbacks. Teachers are in `teachers`."""
