"""Text to speech from a checkpoint directory."""
