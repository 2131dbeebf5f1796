"""Long documents, their tokens shared among processes: the loss curve of one process, with half of its activations."""
