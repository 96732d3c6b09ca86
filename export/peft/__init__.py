"""Write a delta as a PEFT LoRA adapter folder: exact where its rank is low, by SVD elsewhere."""
