"""Measuring engines: load on a URL, and nybble's own speed offline. The load client never imports torch."""
