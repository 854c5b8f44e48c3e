"""Text to speech from a checkpoint directory."""

from s1kernels.speech.audio import Audio
from s1kernels.speech.conversation import IncompleteSpeech
from s1kernels.speech.speech import Speech
from s1kernels.speech.voice import Voice

__all__ = ["Audio", "IncompleteSpeech", "Speech", "Voice"]
