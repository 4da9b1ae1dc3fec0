"""What the training loop is made of: its state, its calls, its evaluation, its metrics."""
