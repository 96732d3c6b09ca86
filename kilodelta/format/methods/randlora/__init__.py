"""RandLoRA: a full-rank delta, the sum of many low-rank products of random matrices."""
