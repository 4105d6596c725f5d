"""The real-time server: an OpenAI-compatible API in front of one model process with continuous batching."""
