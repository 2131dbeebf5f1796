"""Typed entry points over the native CPU library: the optimizer step, flat helper ops, threads, host memory."""
