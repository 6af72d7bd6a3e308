"""Bounds on the likelihood of targets under a masked diffusion model: policy, designs, requests, scorer."""
