"""LoRA: a low-rank delta whose factors are the coefficients themselves."""
