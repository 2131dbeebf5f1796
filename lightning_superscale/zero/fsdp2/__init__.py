"""Transport of ZeRO-3: FSDP2 gathers weights, gradients leave as in stage 2."""
