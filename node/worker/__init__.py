"""One node's life: joining, training, leaving (`node`), and what it measures beside the loss (`meter`)."""
