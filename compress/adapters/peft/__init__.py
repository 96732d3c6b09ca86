"""Read Hugging Face PEFT's adapter folders: LoRA, RandLora, VeRA and Uni-LoRA."""
