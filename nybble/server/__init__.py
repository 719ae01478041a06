"""The OpenAI-compatible HTTP server: everything between a socket and an `EngineClient`. No torch."""
