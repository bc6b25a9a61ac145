"""Fine-tuning on Hugging Face's Trainer."""
