"""Read GGUF files: the header, the tensors, their Hugging Face names, and the configuration."""
