"""Runs a real vLLM server on the loopback interface: token equality with transformers, and throughput."""
