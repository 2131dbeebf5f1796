"""Transport of ZeRO-3: FSDP2 gathers weights, and gradients are reduced as in stage 2."""
