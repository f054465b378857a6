"""Fine-tuning the decoder of a VAE."""
