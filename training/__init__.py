"""Fine-tuning the U-Net and the text encoders: objective, networks, optimizer, step, state, export."""
