"""A small transformer that learns to add by reinforcement learning, through the fused loss."""
