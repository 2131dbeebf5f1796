"""`superscale migrate`: from DeepSpeed's configuration, and from Lightning's strategies of DeepSpeed and FSDP, to ours.

`source` reads, `deepspeed` and `lightning_strategies` decide, over the tables of `deepspeed_keys`; `optimizer` and
`schedulers` write code; `target` is what is printed, `command` prints it.
"""
