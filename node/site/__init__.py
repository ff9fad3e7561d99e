"""A node that is a torch.distributed world: a site of several processes, which hold one model together (FSDP2)."""
