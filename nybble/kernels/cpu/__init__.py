"""Implementations for CPUs beyond plain torch: C built by the machine's compiler, and torch's own packed products."""
