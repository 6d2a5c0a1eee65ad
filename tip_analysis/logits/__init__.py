"""What is computed of two rows of logits, and how: the equations, the pass on tensors, and the pass on the processor."""
