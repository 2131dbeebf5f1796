"""GPU ops in Triton. Importing this package imports no Triton; calling an op does."""
