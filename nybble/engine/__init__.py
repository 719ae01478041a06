"""Who runs next: the loop, the queues, the KV blocks. Plain Python; no tensors."""
