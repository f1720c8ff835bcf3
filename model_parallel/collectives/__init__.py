"""How ranks exchange tensors: in one process, through shared memory, over Gloo, NCCL or symmetric memory."""
