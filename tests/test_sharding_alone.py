"""What training at full size needs of one process: draws, checkpointing, the plan, prompts."""
